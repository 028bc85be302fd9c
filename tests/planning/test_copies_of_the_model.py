"""profile.replicas in `plan`: how many copies of the model it chooses, what they take, what is said and refused."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner

from fitune.cli import cli
from fitune.config import run as runs
from fitune.config.model_shapes import find_shape
from fitune.config.schema import AUTO
from fitune.errors import UsageError
from fitune.launching.run_folder import as_started, begin_to_train, open_run_folder
from fitune.planning.asking import as_trained
from fitune.planning.fill import AS_FAST, filled, resolve
from fitune.planning.found import best_of_each_kind
from fitune.planning.gpu_models import gpu_model, likely_model
from fitune.planning.head import detail_lines
from fitune.planning.limits import given_machine, limits_of
from fitune.planning.memory import MEASURED, gpu_peak, host_peak
from fitune.planning.outlook import look_around, nearest_changes
from fitune.planning.plan import make_plan, setup_of
from fitune.planning.presets import as_typed
from fitune.planning.search import find
from fitune.planning.sizes import GIB
from fitune.planning.step_time import step_seconds
from fitune.planning.tiers import matrix
from fitune.planning.words import described

SMALLEST = ("profile.micro_batch=1", "profile.kept_layers=0")


def setup(recipe: str, profile: str, *sets: str):
    run = resolve(recipe, profile, sets)
    return setup_of(run, find_shape(run.recipe.base.model))


@pytest.mark.parametrize(
    ("recipe", "profile", "copies"),
    [
        ("llama3_8b_qlora", "fsdp_4x24gb", 4),
        ("llama3_8b_lora", "fsdp_4x24gb", 2),  # 15 GiB on each card would leave no room for kept layers
        ("llama3_70b_qlora", "fsdp_4x24gb", 1),  # no two of the cards could hold it
        ("llama3_8b_full", "fsdp_full_4x141gb", 1),  # as fast with more, which hold the optimizer's states twice
    ],
)
def test_plan_takes_as_many_as_are_fastest(recipe, profile, copies):
    run = resolve(recipe, profile)
    assert run.profile.replicas == copies
    shape, model = find_shape(run.recipe.base.model), likely_model(run.profile.gpu_memory_gib)
    seconds = step_seconds(setup_of(run, shape), model)["total"]
    for count in runs.possible_replicas(run.accelerate.num_processes, 1):
        other = resolve(recipe, profile, (f"profile.replicas={count}",))
        if make_plan(other, limits_of(other)).fits:
            assert seconds <= (1 + AS_FAST) * step_seconds(setup_of(other, shape), model)["total"]


def test_a_whole_copy_takes_what_one_gpu_takes_alone_and_what_nccl_needs():
    four = setup("llama3_8b_qlora", "fsdp_4x24gb", *SMALLEST)
    assert four.holds_a_whole_copy and (four.replicas, four.shards) == (4, 1)
    one = setup("llama3_8b_qlora", "single_gpu", *SMALLEST)
    assert gpu_peak(four).allocated == pytest.approx(gpu_peak(one).allocated)
    assert gpu_peak(four).total == pytest.approx(gpu_peak(one).total + MEASURED.nccl)
    asked = [as_trained(whole).gpu for whole in (four, one)]
    assert asked[0] * GIB == pytest.approx(asked[1] * GIB + MEASURED.nccl)
    sharded = setup("llama3_8b_qlora", "fsdp_4x24gb", *SMALLEST, "profile.replicas=1")
    assert gpu_peak(sharded).total < gpu_peak(four).total and not sharded.holds_a_whole_copy


def test_each_copy_has_its_weights_in_ram():
    in_ram = [
        setup("llama3_8b_qlora", "fsdp_offload_2x24gb", *SMALLEST, "profile.async_save=false", f"profile.replicas={n}")
        for n in (1, 2)
    ]
    per_copy = in_ram[0].shape.layers * in_ram[0].layer_weights + in_ram[0].embeddings
    assert host_peak(in_ram[1]) - host_peak(in_ram[0]) >= per_copy
    assert not in_ram[1].holds_a_whole_copy, "weights travel from host RAM"


def test_whole_copies_send_adapters_once_a_step_when_they_have_computed():
    model = gpu_model("RTX 4090")
    four = setup("llama3_8b_qlora", "fsdp_4x24gb", *SMALLEST)
    parts = step_seconds(four, model)
    assert parts["network"] == 0
    bytes_in = 2 * four.trainable * 4 * 3 / 4  # a ring of four, float32
    assert parts["adding up adapters"] == pytest.approx(bytes_in / (model.peer_link_gb_s * 0.85e9))
    assert parts["total"] >= parts["compute"] + parts["adding up adapters"]
    assert step_seconds(replace(four, accumulation=8), model)["adding up adapters"] == parts["adding up adapters"]
    two_machines = step_seconds(replace(four, machines=2), model, network_gb_s=1)["adding up adapters"]
    between = 2 * four.trainable * 4 / 2 / 0.85e9
    inside = four.trainable * 4 / (model.peer_link_gb_s * 0.85e9)
    assert two_machines == pytest.approx(between + inside)


def test_a_copy_over_two_machines_sends_half_of_its_gradients_from_each():
    """Four machines, two copies: what crosses the network beside the gradients is the same for a copy over two."""
    model, copies = gpu_model("RTX 4090"), {}
    for machines, replicas in ((2, 1), (4, 2)):
        one = setup("llama3_8b_lora", "fsdp_4x24gb", *SMALLEST, "profile.replicas=1")
        one = replace(one, ranks=2 * machines, machines=machines, replicas=replicas)
        copies[replicas] = step_seconds(one, model, network_gb_s=1)["network"]
    gradients = one.trainable * 4
    assert copies[2] - copies[1] == pytest.approx(gradients / 2 / 0.85e9)  # 2 x (2 - 1) / 2 of a half, float32


def test_it_is_said_in_words_and_in_json():
    run = resolve("llama3_8b_qlora", "fsdp_4x24gb")
    assert described(make_plan(run, limits_of(run))).startswith("4 GPUs, a copy of the model on each, weights on the")
    two = resolve("llama3_8b_lora", "fsdp_4x24gb")
    assert described(make_plan(two, limits_of(two))).startswith("4 GPUs, 2 copies of the model, weights on the GPUs")
    one = resolve("llama3_70b_qlora", "fsdp_4x24gb")
    assert described(make_plan(one, limits_of(one))).startswith("4 GPUs, one copy of the model, weights on the GPUs")
    alone = resolve("llama3_8b_qlora", "single_gpu")
    assert described(make_plan(alone, limits_of(alone))).startswith("1 GPU, weights on the GPUs")
    asked = ["plan", "llama3_8b_qlora", "--gpus", "4", "--gpu", "RTX 4090", "--host-memory", "128"]
    done = CliRunner().invoke(cli, asked)
    assert done.exit_code == 0, done.output
    assert "4 GPUs, a copy of the model on each" in done.stdout
    assert json.loads(CliRunner().invoke(cli, [*asked, "--json"]).stdout)["replicas"] == 4


def test_each_way_that_was_tried_has_its_copies():
    asked = ["plan", "llama3_8b_lora", "--gpus", "4", "--gpu", "RTX 4090", "--host-memory", "64", "--find"]
    lines = CliRunner().invoke(cli, asked).stdout.partition("tried, the best of each kind first\n")[2].splitlines()
    heading = next(line for line in lines if "copies" in line)
    shown = [line for line in lines if line.startswith("weight") or line.startswith("embedding")]
    copies = [int(line[: heading.index("copies") + len("copies")].split()[-1]) for line in shown]
    found = find("llama3_8b_lora", (), given_machine(4, 24, 64), gpu_model("RTX 4090"))
    assert copies == [plan.setup.replicas for plan in best_of_each_kind(found)][: len(copies)]
    assert set(copies) == {1, 2, 3}
    told = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).stdout)
    assert [way["replicas"] for way in told["tried"]] == [plan.setup.replicas for plan in found.tried]


def test_the_table_of_all_profiles_has_the_copies_of_each():
    rows = {row["profile"]: row["methods"] for row in matrix("llama3_8b_qlora", ())}
    lines = CliRunner().invoke(cli, ["plan", "llama3_8b_qlora", "--all"]).stdout.splitlines()
    shown = {
        line.split()[0]: re.findall(r"no: full|[\d.]+!? \+ [\d.]+!?(?: x\d+)?", line[42:]) for line in lines if line
    }
    for profile, methods in rows.items():
        copies = [entry.get("replicas", 1) for entry in methods.values()]
        assert [int(cell.partition(" x")[2] or 1) for cell in shown[profile]] == copies, profile
    assert "fsdp_full_16x80gb: 8 GPUs have nothing to do in a step of global_batch_size rows" in lines


@pytest.mark.parametrize(("machines", "replicas", "said"), [(1, 1, ""), (1, 2, "2 copies"), (1, 4, "4 copies"),
                                                            (4, 4, ""), (2, 4, "2 copies"), (2, 1, "")])  # fmt: skip
def test_several_copies_on_a_machine_each_read_the_base_which_plan_says(machines, replicas, said):
    run = resolve("llama3_8b_lora", "fsdp_4x24gb", ("profile.replicas=1",))
    plan = make_plan(run, limits_of(run))
    lines = detail_lines(replace(plan, setup=replace(plan.setup, machines=machines, replicas=replicas)))
    texts = [str(line.text) for line in lines if line.label == "reading"]
    assert [text.split(" reads")[0] for text in texts] == [f"each of {said}"] * bool(said)
    if said:  # 8,030 M parameters in bf16
        assert "reads the base: 16.1 GB of a disk that the page cache serves, " in texts[0]
        assert texts[0].endswith(f", {int(said[0]) * 16.06:.1f} GB of a network disk that it does not")


def test_machines_hold_a_copy_or_more_each_though_one_over_all_would_be_as_fast():
    plan = find("llama3_8b_lora", ("global_batch_size=64",), given_machine(4, 24, 512), machines=2).plan
    assert plan.setup.replicas >= 2 and plan.setup.replicas % 2 == 0


@pytest.mark.parametrize(
    ("ranks", "machines", "allowed"),
    [(1, 1, [1]), (4, 1, [1, 2, 4]), (6, 1, [1, 2, 3, 6]), (5, 1, [1, 5]), (16, 2, [1, 2, 4, 8, 16]),
     (6, 2, [1, 2, 6]), (12, 3, [1, 3, 6, 12])],
)  # fmt: skip
def test_copies_are_equal_parts_of_machines_or_whole_machines(ranks, machines, allowed):
    assert runs.possible_replicas(ranks, machines) == allowed


def test_a_number_that_the_gpus_cannot_hold_is_refused_before_anything_is_loaded():
    with pytest.raises(UsageError, match=r"profile.replicas 3: .*has 4 processes on 1 machine, which can hold 1, 2, 4"):
        runs.resolve("llama3_8b_qlora", "fsdp_4x24gb", ("profile.replicas=3",))
    four = given_machine(4, 24, 128)
    with pytest.raises(UsageError, match=r"--set profile.replicas=5: 4 GPUs can hold 1, 2, 3, 4 or auto"):
        find("llama3_8b_qlora", ("profile.replicas=5",), four)
    assert find("llama3_8b_qlora", ("profile.replicas=3",), four).plan.setup.ranks == 3


def test_a_run_that_was_edited_to_such_a_number_is_refused_too(tmp_path):
    run = resolve("llama3_8b_lora", "fsdp_4x24gb", ("profile.replicas=2",), str(tmp_path))
    (tmp_path / "run.yaml").write_text(runs.dump(run).replace("replicas: 2", "replicas: 3"))
    with pytest.raises(UsageError, match=r"profile.replicas 3: .*, which can hold 1, 2, 4 or auto"):
        runs.load(tmp_path)


def test_what_was_chosen_stays_when_a_run_goes_on(tmp_path):
    sets = ("profile.replicas=2", "data.prepared=none")
    started = resolve("llama3_8b_lora", "fsdp_4x24gb", sets, str(tmp_path / "run"))
    with open_run_folder(started, resume=False):
        begin_to_train(started)
    again = runs.resolve("llama3_8b_lora", "fsdp_4x24gb", sets[1:], str(tmp_path / "run"))
    assert again.profile.replicas == AUTO and filled(again, replace(limits_of(again), gpu=1000)).replicas == 4
    assert as_started(again).replicas == 2
    for profile in ("fsdp_1x48gb", "fsdp_2x40gb"):  # two could hold two copies, which were chosen for four
        other_ranks = runs.resolve("llama3_8b_lora", profile, sets[1:], str(tmp_path / "run"))
        assert as_started(other_ranks).profile.replicas == AUTO


def test_the_key_of_earlier_versions_is_told_what_took_its_place():
    with pytest.raises(UsageError, match="--set: unknown key 'hybrid_sharding'; replicas took its place"):
        find("llama3_8b_qlora", ("profile.hybrid_sharding=true",), given_machine(4, 24, 128))


def test_fewer_copies_are_named_where_they_make_it_fit():
    run = resolve("llama3_8b_lora", "fsdp_4x24gb", ("profile.replicas=4", "profile.micro_batch=1"))
    plan = make_plan(run, replace(limits_of(run), gpu=12))
    assert not plan.fits
    assert "--set profile.replicas=1" in " ".join(nearest_changes(plan))
    few, many = (look_around(make_plan(run, limits_of(run))) for run in (_with_copies(run, 1), run))
    assert few.largest_micro_batch == many.largest_micro_batch, "at most: with one copy"


def _with_copies(run, count: int):
    return run.model_copy(update={"profile": run.profile.model_copy(update={"replicas": count})})


def test_a_preset_that_is_filled_elsewhere_is_typed_with_its_copies():
    run = runs.resolve("llama3_8b_lora", "fsdp_4x24gb")
    assert as_typed(filled(run, limits_of(run))) == "fsdp_4x24gb"
    assert "--set profile.replicas=4" in as_typed(filled(run, replace(limits_of(run), gpu=100)))


@pytest.mark.parametrize(("earlier", "machines", "copies"), [(True, 2, 2), (False, 2, 1), (None, 1, 1), ("auto", 2, 1)])
def test_runs_of_earlier_versions_have_the_copies_they_had(earlier, machines, copies, tmp_path):
    run = resolve("llama3_8b_lora", "fsdp_4x24gb", (), str(tmp_path))
    content = yaml.safe_load(runs.dump(run))
    del content["profile"]["replicas"]
    content["profile"] |= {"hybrid_sharding": earlier} if earlier is not None else {}
    content["accelerate"]["num_machines"] = machines
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert runs.load(tmp_path).replicas == copies


def test_what_lies_in_ram_lies_there_once_a_machine():
    sets, plenty = ("profile.embedding_offload=true",), given_machine(4, 80, 2048)
    plans = [find("llama3_8b_lora", sets, plenty, machines=machines).plan for machines in (1, 2)]
    assert [plan.setup.replicas for plan in plans] == [1, 2]
