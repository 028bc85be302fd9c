"""A given model, or an adapter on its base, as a run of this machine that only asks: held as `planning.asking` says."""

import sys
from pathlib import Path

from fitune import __version__
from fitune.config import run as runs
from fitune.config.accelerate_config import written_out
from fitune.config.recipe import Base, Data, Lora, Recipe
from fitune.config.run import FOUND
from fitune.config.schema import ADAPTER, AccelerateConfig, Profile, Run
from fitune.errors import UsageError
from fitune.planning.asked_folder import asked_folder
from fitune.planning.asking import CONVERSATION, METHOD, NF4_BITS, STORED, Holding, Reading, as_plain, choose, fits
from fitune.planning.hardware import this_machine
from fitune.planning.machine import Machine
from fitune.training.given_model import GivenModel


def how_to_hold(
    given: GivenModel, load: str, *, exact: bool = False, reading: Reading = CONVERSATION
) -> Holding | None:
    """None where plain transformers hold it as it is, on the first GPU or the CPU. UsageError where it fits nowhere.

    What plain transformers have no room for, though processes of fitune's own do, goes to one of those.

    It is said on stderr. `load` is what --load gave, `exact` and `reading` as in `choose`.
    """
    try:
        asked = asked_folder(given.folder)
    except UsageError:  # another architecture: transformers may know it
        if load == "auto":
            return None
        raise
    machine = this_machine()
    way = choose(asked, machine, load, exact=exact, reading=reading, name=str(given.folder))
    as_it_is = NF4_BITS if asked.shape.nf4_on_disk else STORED
    plain_alone = _cannot_be_held(given.folder) if given.is_adapter else None
    if plain_alone:
        way = choose(asked, machine, as_it_is, reading=reading, name=str(given.folder))
        if way.gathers or way.cards or load not in ("auto", as_it_is):
            raise plain_alone
    is_plain = not (way.gathers or way.cards) and way.load == as_it_is
    if is_plain and (plain_alone or fits(as_plain(way, asked, reading), machine)):
        return None
    print(f"{given.folder}: {way}: {needs(way)}", file=sys.stderr)
    return way


def _cannot_be_held(adapter: Path) -> UsageError | None:
    """Why an adapter cannot be held by processes of fitune's own, which plain PEFT may know."""
    from fitune.export.adapter import AdapterFile
    from fitune.training.held_adapter import hold

    try:
        with AdapterFile(adapter) as file:
            hold(file)
    except UsageError as error:
        return error
    return None


def needs(way: Holding) -> str:
    """In words."""
    return f"{way.gpu:.1f} GiB of each GPU, {way.host:.1f} of RAM" if way.ranks else f"{way.host:.1f} GiB of RAM"


def run_to_ask(given: GivenModel, way: Holding, folder: Path) -> Run:
    """run.yaml and accelerate.yaml in `folder`, which start the processes that hold the model.

    An adapter is linked to where ranks look for the result of their run.
    """
    if given.is_adapter:
        (folder / ADAPTER).symlink_to(given.folder.absolute())
    recipe = Recipe(
        description="Made by generate and eval.", base=Base(model=str(given.base.absolute())),
        data=Data(dataset="none", prepared=str(folder), chat_template="tokenizer"),
        method=METHOD[way.load], lora=_lora(given), max_length=1, packing=False, global_batch_size=max(1, way.ranks),
    )  # fmt: skip
    profile = Profile(
        description="Made by generate and eval.", accelerate_config=FOUND, num_gpus=way.ranks,
        gpu_memory_gib=way.gpu or None, host_memory_gib=way.host, micro_batch=1, kept_layers=0,
    )  # fmt: skip
    run = Run(
        fitune=__version__, recipe_name=given.folder.name, profile_name="asked", output_dir=str(folder),
        recipe=recipe, profile=profile, accelerate=write_processes(way, folder), gradient_accumulation_steps=1,
    )  # fmt: skip
    (folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    return run


def _lora(given: GivenModel) -> Lora:
    """The shape in which an adapter is held. The schema wants one without an adapter too, which nobody makes then."""
    if not given.is_adapter:
        return Lora(r=1)
    from fitune.export.adapter import AdapterFile
    from fitune.training.held_adapter import hold

    with AdapterFile(given.folder) as file:
        held = hold(file)
    tokens = given.tokenizer().convert_ids_to_tokens(held.token_ids) if held.token_ids else []
    alpha = held.scale * held.rank
    return Lora(r=held.rank, alpha=alpha, dropout=0, target_modules=held.modules, trainable_tokens=tokens)


def write_processes(way: Holding, folder: Path) -> AccelerateConfig:
    """accelerate.yaml in `folder`, which starts as many processes as `way` takes."""
    config = AccelerateConfig(
        path=str(folder / FOUND), num_processes=max(1, way.ranks), use_cpu=not way.ranks, main_process_port=0,
        mixed_precision="bf16" if way.ranks else "no", offload_params=way.offload,
        gpu_ids=Machine(way.cards, 0, 0).gpu_ids or None,
    )  # fmt: skip
    Path(config.path).write_text(written_out(config), encoding="utf-8")
    return config
