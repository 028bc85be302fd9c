"""A model's folder, or a run's result, as a run of this machine that only asks: held as `planning.asking` says."""

import sys
from pathlib import Path

from fitune import __version__
from fitune.config import run as runs
from fitune.config.accelerate_config import written_out
from fitune.config.model_shapes import find_shape
from fitune.config.run import FOUND
from fitune.config.schema import AccelerateConfig, Base, Data, Lora, Profile, Recipe, Run
from fitune.errors import UsageError
from fitune.planning.asking import METHOD, NF4_BITS, STORED, Holding, choose
from fitune.planning.hardware import this_machine


def how_to_hold(model: Path, load: str, *, exact: bool = False) -> Holding | None:
    """None where plain transformers hold it as it is, on one device. UsageError where it fits nowhere here.

    It is said on stderr. `load` is what --load gave, `exact` as in `choose`.
    """
    try:
        shape = find_shape(str(model))
    except UsageError:  # another architecture: transformers may know it
        if load == "auto":
            return None
        raise
    way = choose(shape, this_machine(), load, exact=exact, name=str(model))
    if not way.gathers and way.load == (NF4_BITS if shape.nf4_on_disk else STORED):
        return None
    print(f"{model}: {way}: {_needs(way)}", file=sys.stderr)
    return way


def _needs(way: Holding) -> str:
    return f"{way.gpu:.1f} GiB of each GPU, {way.host:.1f} of RAM" if way.ranks else f"{way.host:.1f} GiB of RAM"


def run_to_ask(model: Path, way: Holding, folder: Path) -> Run:
    """run.yaml and accelerate.yaml in `folder`, which start the processes that hold the model."""
    lora = Lora(r=1)  # the schema's: without an adapter there is none
    recipe = Recipe(
        description="Made by generate and eval.", base=Base(model=str(model.absolute())),
        data=Data(dataset="none", prepared=str(folder), chat_template="tokenizer"),
        method=METHOD[way.load], lora=lora, max_length=1, packing=False, global_batch_size=max(1, way.ranks),
    )  # fmt: skip
    profile = Profile(
        description="Made by generate and eval.", accelerate_config=FOUND, num_gpus=way.ranks,
        gpu_memory_gib=way.gpu or None, host_memory_gib=way.host, micro_batch=1, kept_layers=0,
    )  # fmt: skip
    return _written(
        Run(
            fitune=__version__, recipe_name=model.name, profile_name="asked", output_dir=str(folder), recipe=recipe,
            profile=profile, accelerate=_processes(way, folder), gradient_accumulation_steps=1,
        ),
    )  # fmt: skip


def _processes(way: Holding, folder: Path) -> AccelerateConfig:
    return AccelerateConfig(
        path=str(folder / FOUND), num_processes=max(1, way.ranks), use_cpu=not way.ranks, main_process_port=0,
        mixed_precision="bf16" if way.ranks else "no", offload_params=way.offload,
    )  # fmt: skip


def _written(run: Run) -> Run:
    Path(run.accelerate.path).write_text(written_out(run.accelerate), encoding="utf-8")
    (run.folder / "run.yaml").write_text(runs.dump(run), encoding="utf-8")
    return run
