"""Every shipped profile, filled, against every method: what `plan --all` shows."""

from collections.abc import Sequence

from fitune.config import run as runs
from fitune.config.recipe import Lora, Recipe
from fitune.config.schema import Run
from fitune.config.shipped import name_of
from fitune.planning.fill import filled
from fitune.planning.limits import limits_of
from fitune.planning.outlook import shortfall
from fitune.planning.plan import make_plan
from fitune.planning.presets import preset_runs

METHODS = ("qlora", "lora", "full")


def matrix(recipe_name: str, sets: tuple[str, ...], own: Sequence[str] = ()) -> list[dict]:
    """Every shipped profile, and the files `own`, against every method for a recipe's model, filled."""
    recipe = runs.load_recipe(recipe_name, runs.parse_sets(sets)[0])
    rows = {}
    for method in METHODS:
        for run in preset_runs(name_of(recipe_name), _with_method(recipe, method), any_method=True, own=own):
            if run.accelerate.use_cpu:
                continue
            profile = run.profile
            row = {"profile": run.profile_name, "gpus": profile.num_gpus, "gpu_memory_gib": profile.gpu_memory_gib,
                   "host_memory_gib": profile.host_memory_gib, "methods": {}}  # fmt: skip
            rows.setdefault(run.profile_name, row)["methods"][method] = _outcome(run)
    return list(rows.values())


def _with_method(recipe: Recipe, method: str) -> Recipe:
    lora = None if method == "full" else recipe.lora or Lora()
    return recipe.model_copy(update={"method": method, "lora": lora})


def _outcome(run: Run) -> dict:
    """What one run needs, and why it does not fit."""
    if run.profile.embedding_offload and run.recipe.method == "full":
        return {"fits": False, "why_not": "embedding_offload is for a frozen base", "short_of": []}
    plan = make_plan(filled(run, limits_of(run)), limits_of(run))
    short = [verdict for verdict in plan.verdicts if not verdict.fits]
    return {
        "fits": plan.fits,
        "micro_batch": plan.setup.micro_batch,
        "kept_layers": plan.setup.kept_layers,
        "reshard_after_forward": plan.setup.reshard,
        "replicas": plan.setup.replicas,
        "peak_gpu_gib": round(plan.gpu.total / 2**30, 1),
        "peak_host_gib": round(sum(plan.host[plan.host_phase].values()) / 2**30, 1),
        "short_of": [verdict.resource for verdict in short],
        "why_not": shortfall(plan) or None,
        "idle_gpus": max(0, plan.setup.ranks - run.recipe.global_batch_size),
    }
