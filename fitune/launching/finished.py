"""What a run's folder says of its result, and the files that tell of it, which no later result may inherit.

finished.json   the step and epoch at which training ended, the steps asked for, whether it stopped early; result_step,
                the step whose weights are the result, where that is an earlier one: the best evaluation
best.json       result_step, from when the best is chosen until finished.json says it: the model card is written between
passed.json     the same of a result that training has gone on from; gone when the run is finished again
eval.json, eval-ROWS.json, answers.json   what was measured of the result; when training goes on its step joins the name
"""

import json
import re
from pathlib import Path

from fitune.config.json_file import json_or_nothing
from fitune.output_folder import write_whole

FINISHED, PASSED, BEST = "finished.json", "passed.json", "best.json"
KEPT = re.compile(r"eval-checkpoint-\d+|.*-of-(step-\d+|an-earlier-result)$")
"What tells of a checkpoint, or of an earlier result, by its name without `.json`."


def read_finished(folder: Path) -> dict:
    """{} without a result, and for a damaged file."""
    return json_or_nothing(folder / FINISHED)


def write_finished(folder: Path, content: dict) -> None:
    write_whole(folder / FINISHED, json.dumps(content) + "\n")
    for outdated in (PASSED, BEST):
        (folder / outdated).unlink(missing_ok=True)


def note_best(folder: Path, step: int | None) -> None:
    """The weights of `step` are about to become the result; None: those of the last step."""
    if step is None:
        (folder / BEST).unlink(missing_ok=True)
    else:
        write_whole(folder / BEST, json.dumps({"result_step": step}) + "\n")


def noted_best(folder: Path) -> int | None:
    return json_or_nothing(folder / BEST).get("result_step")


def finished_at(folder: Path) -> int | None:
    """When the result was whole, as its file system counts; None before."""
    try:
        return (folder / FINISHED).stat().st_mtime_ns
    except OSError:
        return None


def go_on_from(folder: Path) -> None:
    """The result is no longer the run's: training goes on. What was measured of it took time, and is kept."""
    note_best(folder, None)
    for file in [*folder.glob("eval*.json"), *folder.glob("answers*.json")]:
        if not KEPT.match(file.stem):
            file.replace(_earlier(file, _step(folder)))
    if (folder / FINISHED).is_file():
        (folder / FINISHED).replace(folder / PASSED)


def passed_step(folder: Path) -> int | None:
    """The step of a result that training has gone on from and not finished since; None for any other."""
    return None if (folder / FINISHED).is_file() else _of_result(json_or_nothing(folder / PASSED))


class Measuring:
    """Of a run's result, made before the result is read: training may go on while it is measured."""

    def __init__(self, folder: Path):
        self.folder, self.at, self.step = folder, finished_at(folder), _step(folder)

    @property
    def is_the_results(self) -> bool:
        """Whether what was measured is still that of the run's result."""
        return finished_at(self.folder) == self.at

    def file(self, name: str) -> Path:
        """Where it is written, by its name without `.json`."""
        file = self.folder / f"{name}.json"
        return file if self.is_the_results or KEPT.match(name) else _earlier(file, self.step)


def _step(folder: Path) -> int | None:
    return _of_result(read_finished(folder) or json_or_nothing(folder / PASSED))


def _of_result(finished: dict) -> int | None:
    """The step whose weights the result has."""
    return finished.get("result_step", finished.get("step"))


def _earlier(file: Path, step: int | None) -> Path:
    return file.with_name(f"{file.stem}-of-{f'step-{step}' if step else 'an-earlier-result'}.json")
