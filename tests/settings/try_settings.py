"""Tries every field of SFTConfig and every optimizer, each alone, and writes docs/settings.md.

    python tests/settings/try_settings.py          (or: make settings; about a quarter of an hour)

Each goes through the real `plan` and `train` commands on a tiny model, two ranks on the CPU. What is refused must be
refused by both, in one line, before anything is loaded. What is accepted must train to its end and change something
that can be seen: the runs are compared with one without the field. No traceback anywhere. Optimizers train on one and
two ranks, and with weights in host RAM; resumed half way, they must end with the bytes of the run that was not.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # read when libraries are imported
for needed in (ROOT, HERE.parent, HERE.parent / "faults", HERE):
    sys.path.insert(0, str(needed))

import conftest  # noqa: E402
import quick_python  # noqa: E402
from commands import accelerate_text  # noqa: E402
from outcomes import Outcome, differences  # noqa: E402
from settings_page import PAGE, OptimizerResult, Result, write_page  # noqa: E402
from trials import BASE, Trial, fields_not_set_here, optimizers_not_used, trials  # noqa: E402

from fitune.config.optimizers import ARGUMENTS  # noqa: E402

PLACES = {"one rank": (1, False), "two ranks": (2, False), "two ranks, offloaded": (2, True)}
LONGEST = 600
"Seconds that one run may take."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder; what was tried in it before is not tried again")
    parser.add_argument("--page", type=Path, default=PAGE, help="[default: docs/settings.md]")
    parser.add_argument("--only", nargs="+", metavar="FIELD", help="try these and write no page")
    options = parser.parse_args()
    work = options.work or Path(tempfile.mkdtemp(prefix="fitune-settings-"))
    bench = Bench(work.absolute())
    try_all(bench, options)
    if bench.mistakes:
        sys.exit("\n".join([f"{len(bench.mistakes)} mistakes:", *bench.mistakes]))
    if options.work is None:
        shutil.rmtree(work)


def try_all(bench: "Bench", options: argparse.Namespace) -> None:
    chosen = [trial for trial in trials() if not options.only or trial.field in options.only]
    results = [bench.try_field(trial) for trial in chosen]
    if not options.only:
        refused = [bench.try_refused(trial) for trial in fields_not_set_here()]
        refused += [bench.try_refused(Trial("optim", name)) for name in optimizers_not_used()]
        optimizers = [bench.try_optimizer(name) for name in ARGUMENTS]
        write_page(options.page, results, refused, optimizers)


class Bench:
    """A folder with a tiny base, prepared rows and a recipe; runs commands in it and keeps their outcomes."""

    def __init__(self, work: Path):
        self.work, self.mistakes = work, []
        self.kept = work / "outcomes"
        self.environment = os.environ | {"NO_COLOR": "1", "COLUMNS": "150", "TERM": "dumb"}
        if not (work / "recipe.yaml").is_file():
            conftest.build_base(work / "base", vocab_size=512, hidden_size=64, intermediate_size=192)
            (work / "prepared").mkdir(parents=True)
            for split, count, seed in (("train", 48, 1), ("test", 8, 2)):
                conftest.write_split(work / "prepared", split, count, seed)
            self.kept.mkdir()
            (work / "recipe.yaml").write_text(_recipe(work))
        for place, (ranks, offloaded) in PLACES.items():
            self.accelerate(place).write_text(accelerate_text(ranks, offloaded))

    def accelerate(self, place: str) -> Path:
        return self.work / f"{place.replace(' ', '_').replace(',', '')}.yaml"

    def try_field(self, trial: Trial) -> Result:
        """`train` with the field, compared with a run that has only what it needs."""
        alone = self.command("plan", "recipe.yaml", sets=(f"{trial.field}={trial.value}",)) if trial.needs else None
        planned = self.command("plan", "recipe.yaml", sets=trial.sets)
        outcome = self.train(trial.sets)
        self._check(trial, planned, outcome)
        if outcome.code:
            return Result(trial, outcome.code, said=outcome.refusal)
        base = self.train(trial.needs)
        different = differences(outcome, self.train(()) if base.code else base)
        if different and trial.same:
            self._mistake(trial, f"should be the same run, but: {', '.join(different)}")
        if not different and not trial.same:
            self._mistake(trial, "changes nothing")
        return Result(trial, 0, changes=different, alone=alone.refusal if alone and alone.code else "")

    def try_refused(self, trial: Trial) -> Result:
        planned = self.command("plan", "recipe.yaml", sets=trial.sets)
        outcome = self.train(trial.sets)
        self._check(trial, planned, outcome)
        if outcome.code != 2:
            self._mistake(trial, f"should be refused, exit code {outcome.code}")
        return Result(trial, outcome.code, said=outcome.refusal)

    def _check(self, trial: Trial, planned: Outcome, outcome: Outcome) -> None:
        """A mistake where `plan` and `train` disagree, or one does not end as a command should."""
        for name, found in (("plan", planned), ("train", outcome)):
            if found.has_traceback or found.code not in (0, 2) or (found.code and not found.refusal):
                self._mistake(trial, f"{name} ends with exit code {found.code}: {found.printed[-2000:]}")
        if planned.code != outcome.code or planned.refusal != outcome.refusal:
            self._mistake(trial, f"plan says {planned.refusal!r}, train {outcome.refusal!r}")

    def _mistake(self, trial: Trial, said: str) -> None:
        self.mistakes.append(f"training.{trial.field}={trial.written}: {said}")
        print(f"MISTAKE: {self.mistakes[-1]}", flush=True)

    def try_optimizer(self, name: str) -> OptimizerResult:
        """In each place, a run of six steps and the same resumed after three."""
        exact = {}
        for place in PLACES:
            sets = (f"optim={name}",)
            whole = self.train(sets, place)
            resumed = self.resume_half_way(sets, place)
            exact[place] = not (whole.code or resumed.code) and resumed.result == whole.result
            if not exact[place]:
                self._mistake(Trial("optim", name), f"{place}: resumed, it ends otherwise: {resumed.printed[-1500:]}")
        return OptimizerResult(name, exact)

    def train(self, sets: tuple[str, ...], place: str = "two ranks") -> Outcome:
        sets = tuple(sorted(sets))
        run = self.work / "runs" / _file_name((*sets, place))
        return self.command("train", "recipe.yaml", "--output", str(run), sets=sets, place=place, run=run)

    def resume_half_way(self, sets: tuple[str, ...], place: str) -> Outcome:
        """A copy of a finished run as if it had been killed after step 4: its checkpoint of step 3 is there."""
        finished = self.work / "runs" / _file_name((*sets, place))
        run = finished.with_name(f"{finished.name}-resumed")
        if finished.is_dir() and not run.is_dir():
            shutil.copytree(finished, run)
            for path in (run / "checkpoints/checkpoint-6", run / "adapter"):
                shutil.rmtree(path)
            (run / "finished.json").unlink()
        return self.command("train", "--resume", str(run), run=run)

    def command(self, *words: str, sets=(), place: str = "", run: Path | None = None) -> Outcome:
        """What `cli.py WORDS --set …` did, from an earlier time if it is known."""
        profile = [] if "--resume" in words else ["--profile", "cpu_2proc"]
        flags = [part for text in sets for part in ("--set", f"training.{text}")]
        if place:
            flags += ["--set", f"profile.accelerate_config={self.accelerate(place)}"]
        file = self.kept / f"{_file_name((*words, *sets, place))}.json"
        if not file.is_file():
            started = ["cli.py", *words, *profile, *flags]
            started = [str(self.work / word) if word == "recipe.yaml" else word for word in started]
            done = quick_python.run(started, self.environment, ROOT, LONGEST)
            outcome = Outcome.of(done.returncode, done.stdout + done.stderr, run or self.work)
            file.write_text(json.dumps(outcome.as_json()))
            print(f"{done.returncode} {' '.join([*words[:1], *sets, place])}", flush=True)
        return Outcome(**json.loads(file.read_text()))


def _recipe(work: Path) -> str:
    return yaml.safe_dump(
        {
            "description": "Each field of SFTConfig is added to it alone.",
            "base": {"model": str(work / "base")},
            "data": {"dataset": "none", "prepared": str(work / "prepared"), "chat_template": "llama3"},
            "method": "qlora",
            "lora": {"r": 4, "dropout": 0.0},
            "max_length": 128,
            "global_batch_size": 4,
            "training": {name: yaml.safe_load(value) for name, value in BASE.items()},
        }
    )


def _file_name(words: tuple[str, ...]) -> str:
    return "_".join(word.rpartition("/")[2] for word in words if word)


if __name__ == "__main__":
    main()
