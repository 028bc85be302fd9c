"""Where a run may report to: transformers' names, and the packages that must be installed for them."""

from importlib.util import find_spec
from typing import Any

from fitune.errors import UsageError, nearest

PACKAGES = {
    "azure_ml": "azureml", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet_ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "kubeflow": "kubeflow", "mlflow": "mlflow",
    "neptune": "neptune", "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
NAMED_RUNS = {"comet_ml", "mlflow", "swanlab", "trackio", "wandb"}
"Trackers that show `run_name`."
OF_TRACKIO = ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")


def refuse_missing_trackers(training: dict[str, Any], source: str) -> None:
    """Raises UsageError for an unknown or absent tracker, and for fields of trackers that are not reported to."""
    trackers = reported_to(training)
    for name in trackers:
        if "," in name:
            raise UsageError(f"{source}: training.report_to: a list needs brackets: [{name.replace(',', ', ')}]")
        if name in ("all", "none"):
            if len(trackers) > 1:
                raise UsageError(f"{source}: training.report_to: '{name}' stands alone, not in a list")
        elif name not in PACKAGES:
            raise UsageError(
                f"{source}: training.report_to: unknown tracker '{name}'{nearest(name, ['all', 'none', *PACKAGES])}"
            )
        elif find_spec(PACKAGES[name]) is None:
            raise UsageError(
                f"{source}: training.report_to={name} needs the package {PACKAGES[name]}; "
                f"pip install {PACKAGES[name]}, or report to tensorboard or none"
            )
    for field, able in {"run_name": NAMED_RUNS, **{name: {"trackio"} for name in OF_TRACKIO}}.items():
        if training.get(field) is not None and not able & {*trackers, *(PACKAGES if "all" in trackers else ())}:
            raise UsageError(
                f"{source}: training.{field} is for training.report_to={', '.join(sorted(able))}; "
                f"set that, or remove it"
            )


def reported_to(training: dict[str, Any]) -> list[str]:
    named = training.get("report_to", "tensorboard")
    return list(named) if isinstance(named, list) else [named or "none"]
