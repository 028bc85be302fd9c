"""Reads JobSets with the models that Kubeflow generates from JobSet's and Kubernetes' OpenAPI.

The models pass over keys that they do not know, so what goes in must come out again. A value that is one of a few is
looked for in the field's own description.
"""

import importlib.metadata
import sys
from pathlib import Path

import yaml
from kubeflow_trainer_api import models
from pydantic import ValidationError


def difference(config: dict) -> str | None:
    """The first thing that JobSet does not know of; None if it knows all."""
    try:
        understood = models.JobsetV1alpha2JobSet.from_dict(config).to_dict()
    except ValidationError as error:
        return str(error)
    return _lost(config, understood, "") or _unknown_action(config)


def _lost(given, understood, path: str) -> str | None:
    if isinstance(given, dict) and isinstance(understood, dict):
        pairs = [(f"{path}.{key}", value, understood.get(key)) for key, value in given.items()]
    elif isinstance(given, list) and isinstance(understood, list) and len(given) == len(understood):
        pairs = [(f"{path}[{n}]", *pair) for n, pair in enumerate(zip(given, understood, strict=True))]
    else:
        return None if given == understood else f"{path}: {given!r} became {understood!r}"
    return next((lost for name, value, other in pairs if (lost := _lost(value, other, name))), None)


def _unknown_action(config: dict) -> str | None:
    spec = config["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    rules = [(models.JobsetV1alpha2FailurePolicyRule, rule) for rule in spec["failurePolicy"]["rules"]]
    rules += [(models.IoK8sApiBatchV1PodFailurePolicyRule, rule) for rule in job["podFailurePolicy"]["rules"]]
    for model, rule in rules:
        if rule["action"] not in _words(model.model_fields["action"].description):
            return f"action {rule['action']} is not among: {model.model_fields['action'].description}"
    return None


def _words(text: str) -> set[str]:
    return {word.strip(".,:'`") for word in text.split()}


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]]
    for file in files:
        if wrong := difference(yaml.safe_load(file.read_text())):
            sys.exit(f"{file.name}: {wrong}")
    good = files[0].read_text()
    for right, wrong in (
        ("backoffLimit", "backoffLimits"),
        ("RestartJobSetAndIgnoreMaxRestarts", "RestartJobs"),
        ("replicas: 1", "replicas: many"),
        ("secretKeyRef", "secretRef"),
    ):
        assert right in good and difference(yaml.safe_load(good.replace(right, wrong))), f"{wrong} went through"
    version = importlib.metadata.version("kubeflow-trainer-api")
    print(f"the models of kubeflow-trainer-api {version} know all of {len(files)} JobSets")


if __name__ == "__main__":
    main()
