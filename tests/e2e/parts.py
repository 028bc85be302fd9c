"""What is done with one model, step by step, and what must come out of it."""

import json
import math
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from combinations import Combination
from real_commands import Commands, Failed
from reference import FLOAT32, PlainModel, Reference

TEMPLATE = "tokenizer"
"The model's own: ChatML without marks around its answers."
INSTRUCTIONS = "examples/instructions/instructions.jsonl"
PROMPTS = ["What is the capital of France?", "Name three colours.", "How many days has a week?"]
TYPED = ["What is the capital of France?", "And of Italy?"]
NEW_TOKENS = 16
NOT_OURS = ("packages", "disk", "torch", "GPUs")
"Of what `doctor` finds bad: this machine's, which the test doesn't choose."


@dataclass(frozen=True)
class Size:
    """How much is trained: enough for the held-out loss to fall by more than bf16 explains."""

    max_length: int
    long_rows: str
    global_batch: int
    steps: int
    test_fraction: float


ON_GPU = Size(max_length=256, long_rows="cut", global_batch=8, steps=20, test_fraction=0.08)
ON_CPU = Size(max_length=80, long_rows="drop", global_batch=4, steps=6, test_fraction=0.15)


def check(condition, said: str) -> None:
    if not condition:
        raise Failed(said)


def flags(sets: dict) -> list[str]:
    return [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]


def data_sets(size: Size, prepared: Path, model: Path) -> dict:
    return {
        "base.model": model,
        "data.dataset": INSTRUCTIONS,
        "data.prepared": prepared,
        "data.test_split": "null",
        "data.test_fraction": size.test_fraction,
        "data.system_message": "null",  # a merged model's folder knows of none, and its answers are compared
        "data.chat_template": TEMPLATE,
        "data.long_rows": size.long_rows,
        "max_length": size.max_length,
        "global_batch_size": size.global_batch,
    }


def set_up(commands: Commands, model: Path, work: Path, size: Size, *, untied: bool) -> dict:
    """doctor, list, show, prepare, quantize; with `untied` a copy of the model with a head of its own.

    Returns what is bad.
    """
    printed = commands.call("list", "list")
    check("llama3_8b_qlora" in printed, printed)
    printed = commands.call("show", "show", "llama3_8b_qlora", "--profile", "single_gpu")
    check("accelerate launch" in printed, printed)
    printed = commands.call("doctor", "doctor", "--model", model, expect=(0, 1))
    bad = [line for line in printed.splitlines() if line.startswith("bad")]
    check(all(line.split()[1] in NOT_OURS for line in bad), f"doctor: {bad}")
    check(f"{model} can be read" in printed, "doctor doesn't find the model")
    sets = flags(data_sets(size, work / "data", model))
    printed = commands.call("prepare", "prepare", "llama3_8b_qlora", *sets)
    check("train / test" in printed, printed)
    printed = commands.call("quantize", "quantize", model, "--output", work / "nf4")
    check("--set base.model=" in printed, printed)
    if untied:
        _untie(model, work / "untied")
    return {"doctor_bad": bad}


def _untie(model: Path, output: Path) -> None:
    """A copy whose head is a tensor of its own, beside the embedding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    copy = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    copy.lm_head.weight = torch.nn.Parameter(copy.lm_head.weight.detach().clone())
    copy.config.tie_word_embeddings = False
    copy.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


class Part:
    """One combination: plan, train with an interruption, eval, generate, merge; `compared` holds what was measured."""

    def __init__(self, combination: Combination, commands: Commands, size: Size, work: Path, model: Path, on_gpu: bool):
        self.combination, self.commands, self.size, self.on_gpu = combination, commands, size, on_gpu
        self.run, self.merged = work / "runs" / combination.name, work / "merged" / combination.name
        self.base = model if combination.base == "bf16" else work / combination.base
        self.recipe = f"llama3_8b_{combination.method}"
        self.compared: dict = {}
        self.answers: list[str] = []
        rate = 5e-5 if combination.method == "full" else 1e-3
        training = {
            "max_steps": size.steps, "learning_rate": rate, "logging_steps": 1, "lr_scheduler_type": "constant",
            "eval_strategy": "steps", "eval_steps": size.steps // 2, "save_strategy": "steps",
            "save_steps": size.steps // 2,
        }  # fmt: skip
        sets = data_sets(size, work / "data", self.base) | {"profile.micro_batch": 1 if not on_gpu else 2}
        sets |= {"packing": str(combination.packing).lower()} | self._cpu_processes(work)
        sets |= {f"training.{key}": value for key, value in training.items()} | combination.sets
        self.named = [self.recipe, "--profile", combination.profile, *flags(sets)]

    def _cpu_processes(self, work: Path) -> dict:
        """On the CPU one shipped profile stands for any number of processes, offloaded or not."""
        if self.on_gpu:
            return {}
        name = self.combination.name
        offload = "\n  fsdp_offload_params: true" if name.endswith("offloaded") else ""
        file = work / f"{name}.yaml"
        file.write_text(
            f"distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2{offload}\nuse_cpu: true\n"
            f"num_processes: {self.combination.ranks}\nmain_process_port: 0\n"
        )
        sets = {"profile.accelerate_config": file, "profile.kept_layers": 30}
        return sets if self.combination.method == "full" else sets | {"lora.dropout": 0}  # its masks take CPUs long

    def stages(self, reference: Reference) -> list[Callable[[], None]]:
        """What to call, in order. Nothing works without the first; each of the others may fail and leave the rest."""
        stages = [lambda: self._plan_and_train(reference), self._evaluate, self._ask, self._merge]
        thorough = [self._converse, self._ask_a_checkpoint, self._train_whole]
        return stages + thorough if self.combination.thorough else stages

    def _plan_and_train(self, reference: Reference) -> None:
        """`plan`, a `train` that is interrupted, and its `--resume`; then plain transformers' view of the result."""
        printed = self.commands.call("plan", "plan", *self.named)
        check("GiB" in printed, "plan says nothing about memory")
        train = ["train", *self.named, "--output"]
        if self.combination.thorough:  # beside the rest: the longest of all
            self.whole = ThreadPoolExecutor(1).submit(self.commands.call, "train-whole", *train, self._whole_run())
        number = signal.SIGINT if self.combination.packing else signal.SIGTERM
        printed = self.commands.interrupt(
            "train", *train, self.run, signal_number=number, when=lambda: len(self._logged("loss")) >= 2
        )
        check("which is saved; go on with: python cli.py train --resume" in printed, printed[-1000:])
        before = self._logged("loss")
        self.commands.call("resume", *train, self.run, "--resume")
        check(self._logged("loss")[: len(before)] == before, "the curve before the interruption was changed")
        self.eval_losses = self._check_curve(self.run)
        self.compared |= {"interrupted_after": len(before), "eval_losses": self.eval_losses}
        self._consult(reference)

    def _check_curve(self, run: Path) -> dict[int, float]:
        """Each step was logged once; returns the losses on the held-out rows by step."""
        steps = [line["step"] for line in self._logged("loss", run)]
        check(steps == list(range(1, self.size.steps + 1)), f"logged steps {steps}")
        losses = {line["step"]: line["eval_loss"] for line in self._logged("eval_loss", run)}
        check(set(losses) == {self.size.steps // 2, self.size.steps}, f"evaluated after steps {list(losses)}")
        check(all(map(math.isfinite, losses.values())), f"held-out losses {losses}")
        return losses

    def _logged(self, key: str, run: Path | None = None) -> list[dict]:
        file = (run or self.run) / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [line for line in map(_json_or_nothing, lines) if key in line]

    def _consult(self, reference: Reference) -> None:
        """Sets what plain transformers makes of base and result, and the bounds of losses and answers."""
        combination, result = self.combination, self.run / self._result_name()
        self.base_model = reference.base(combination.trained_over)
        self.tuned_model = reference.tuned(combination.trained_over, result)
        self.tuned_loss = self.tuned_model.loss(reference.rows)
        self.bound = self.base_model.bounds.loss if self.on_gpu else FLOAT32 * self.base_model.loss
        self.gap_bound = self.base_model.bounds.logit_gap

    def _result_name(self) -> str:
        return "model" if self.combination.method == "full" else "adapter"

    def _evaluate(self) -> None:
        """The losses of `eval` against plain transformers and PEFT in float32."""
        self.commands.call("eval", "eval", self.run)
        found = self._losses("eval.json")
        expected = {"base": self.base_model.loss, "tuned": self.tuned_loss}
        self.compared["losses"] = {
            label: {"found": found[label], "float32": loss, "bound": self.bound} for label, loss in expected.items()
        }
        for label, loss in expected.items():
            said = f"{label} loss {found[label]:.5f}, in float32 {loss:.5f}: off by more than {self.bound:.5f}"
            check(abs(found[label] - loss) <= self.bound, said)
        fall = found["base"] - found["tuned"]
        check(fall > 2 * self.bound, f"the held-out loss fell by {fall:.4f}, less than twice {self.bound:.4f}")

    def _losses(self, name: str) -> dict[str, float]:
        report = json.loads((self.run / name).read_text(encoding="utf-8"))
        return {label: report[label]["loss"] for label in ("base", "tuned")}

    def _ask(self) -> None:
        """`generate` on the run: base and tuned answers against plain transformers' greedy ones."""
        asked = self._generate("generate", self.run, "--test", "1")
        check(len(asked) == len(PROMPTS) + 1, f"{len(asked)} answers")
        self.answers = [entry["tuned"] for entry in asked[: len(PROMPTS)]]
        self._compare("base_answers", asked, "base", self.base_model.plain)
        self._compare("tuned_answers", asked, "tuned", self.tuned_model)

    def _merge(self) -> None:
        """The merged model answers as plain transformers does, and as the run did: its base is what was trained on."""
        printed = self.commands.call("merge", "merge", self.run, "--output", self.merged)
        check(f"merged: {self.merged}" in printed, printed)
        merged = self._generate("generate-merged", self.merged)
        self._compare("merged_answers", merged, "model", self.tuned_model)
        if self.answers:  # none if `generate` failed, which is said there
            as_run = [entry | {"run": answer} for entry, answer in zip(merged, self.answers, strict=True)]
            self._compare("merged_as_run", as_run, "model", self.tuned_model, other="run")

    def _generate(self, step: str, folder: Path, *more: str) -> list[dict]:
        file = self.run / f"{step}.json"
        prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        self.commands.call(step, "generate", folder, *prompts, *more, "--max-new-tokens", NEW_TOKENS, "--json", file)
        return json.loads(file.read_text(encoding="utf-8"))

    def _compare(self, name: str, entries: list[dict], label: str, model: PlainModel, other: str | None = None) -> None:
        """Greedy answers are equal, or part at two tokens that bf16 may swap."""
        gaps = []
        for entry in entries:
            messages, said = entry["messages"], entry[label]
            check(said, f"{name}: an empty answer to {messages[-1]['content']!r}")
            expected = entry[other] if other else model.answer(messages, NEW_TOKENS)
            gaps.append(model.gap_where_they_part(messages, said, expected))
        self.compared[name] = {
            "said": [entry[label] for entry in entries],
            "logit_gaps_where_they_part": gaps,
            "bound": self.gap_bound,
        }
        check(max(gaps) <= self.gap_bound, f"{name} part from what is expected at gaps {gaps}: {entries}")

    def _converse(self) -> None:
        """The first answer of a conversation is the one that `--prompt` gives."""
        for step, folder in (("chat", self.run), ("chat-merged", self.merged)):
            words = ["generate", folder, "--chat", "--max-new-tokens", NEW_TOKENS]
            printed = self.commands.call(step, *words, typed="\n".join(TYPED) + "\n")
            said = printed.split("you> ")
            check(len(said) == len(TYPED) + 2 and all(text.strip() for text in said[1:-1]), f"{step}: {printed[-500:]}")
            if step == "chat":
                check(" ".join(self.answers[0].split()) in " ".join(said[1].split()), f"{step}: {said[1]!r}")

    def _ask_a_checkpoint(self) -> None:
        """The last one is worth what training said of it, and answers as the result does.

        Method full's may answer otherwise: it computes with weights rounded to the nearest, its result's are by chance.
        """
        checkpoint = self.run / "checkpoints" / f"checkpoint-{self.size.steps}"
        asked = self._generate("generate-checkpoint", checkpoint)
        if self.combination.method != "full":
            self._compare("checkpoint_answers", asked, "tuned", self.tuned_model)
        self.commands.call("eval-checkpoint", "eval", checkpoint)
        found, expected = self._losses(f"eval-{checkpoint.name}.json")["tuned"], self.eval_losses[self.size.steps]
        check(abs(found - expected) <= self.bound, f"the last checkpoint's loss {found}, in training {expected}")

    def _train_whole(self) -> None:
        """The same without an interruption: what it learned is worth the same on the held-out rows."""
        self.whole.result()
        losses = self._check_curve(self._whole_run())
        self.compared["eval_losses_uninterrupted"] = losses
        off = max(abs(losses[step] - loss) for step, loss in self.eval_losses.items())
        check(off <= self.bound, f"held-out losses {losses}, interrupted and resumed {self.eval_losses}")

    def _whole_run(self) -> Path:
        return self.run.with_name(f"{self.run.name}-whole")


def _json_or_nothing(line: str) -> dict:
    """A line that is being written is none yet."""
    try:
        return json.loads(line)
    except ValueError:
        return {}
