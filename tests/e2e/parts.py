"""What is done with one model, step by step, and what must come out of it."""

import json
import math
import signal
from dataclasses import dataclass
from pathlib import Path

from combinations import Combination
from real_commands import Commands, Failed
from reference import FLOAT32, Reference

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "chatml.jinja"
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


def set_up(commands: Commands, model: Path, work: Path, size: Size) -> dict:
    """doctor, prepare, quantize, and a copy of the model whose head is its own. Returns what doctor found bad."""
    printed = commands.call("doctor", "doctor", "--model", model, expect=(0, 1))
    bad = [line for line in printed.splitlines() if line.startswith("bad")]
    check(all(line.split()[1] in NOT_OURS for line in bad), f"doctor: {bad}")
    check(f"{model} can be read" in printed, "doctor doesn't find the model")
    sets = flags(data_sets(size, work / "data", model))
    printed = commands.call("prepare", "prepare", "llama3_8b_qlora", *sets)
    check("train / test" in printed, printed)
    printed = commands.call("quantize", "quantize", model, "--output", work / "nf4")
    check("--set base.model=" in printed, printed)
    _untie(model, work / "untied")
    return {"doctor_bad": bad}


def _untie(model: Path, output: Path) -> None:
    """A copy for method full, which doesn't train an embedding that is also the head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    copy = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    copy.lm_head.weight.data = copy.lm_head.weight.data.clone()
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

    def go(self, reference: Reference) -> None:
        self._plan_and_train()
        self._evaluate(reference)
        self._ask_and_merge(reference)
        if self.combination.thorough:
            self._converse()
            self._ask_a_checkpoint()

    def _plan_and_train(self) -> None:
        printed = self.commands.call("plan", "plan", *self.named)
        check("GiB" in printed, "plan says nothing about memory")
        train = ["train", *self.named, "--output", self.run]
        number = signal.SIGINT if self.combination.packing else signal.SIGTERM
        printed = self.commands.interrupt(
            "train", *train, signal_number=number, when=lambda: len(self._logged("loss")) >= 2
        )
        check("which is saved; go on with: python cli.py train --resume" in printed, printed[-1000:])
        before = self._logged("loss")
        self.commands.call("resume", *train, "--resume")
        steps = [line["step"] for line in self._logged("loss")]
        check(steps == list(range(1, self.size.steps + 1)), f"logged steps {steps}")
        check(self._logged("loss")[: len(before)] == before, "the curve before the interruption was changed")
        evaluated = {line["step"]: line["eval_loss"] for line in self._logged("eval_loss")}
        check(set(evaluated) == {self.size.steps // 2, self.size.steps}, f"evaluated after steps {list(evaluated)}")
        check(all(map(math.isfinite, evaluated.values())), f"held-out losses {evaluated}")
        self.compared |= {"interrupted_after": len(before), "eval_losses": evaluated}

    def _logged(self, key: str) -> list[dict]:
        file = self.run / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return [line for line in map(_json_or_nothing, lines) if key in line]

    def _evaluate(self, reference: Reference) -> None:
        """The losses of `eval` against plain transformers and PEFT in float32."""
        self.commands.call("eval", "eval", self.run)
        found = json.loads((self.run / "eval.json").read_text(encoding="utf-8"))
        base, self.bounds = reference.of_base(self.combination.base)
        tuned, self.model = reference.of_result(self.combination.base, self._result())
        bound = self.bound = self.bounds.loss if self.on_gpu else FLOAT32 * base
        expected = {"base": base, "tuned": tuned}
        self.compared["losses"] = {
            label: {"found": found[label]["loss"], "float32": loss, "bound": bound} for label, loss in expected.items()
        }
        for label, loss in expected.items():
            off = abs(found[label]["loss"] - loss)
            check(
                off <= bound,
                f"{label} loss {found[label]['loss']:.5f}, in float32 {loss:.5f}: off by more than {bound:.5f}",
            )
        fall = found["base"]["loss"] - found["tuned"]["loss"]
        check(fall > 2 * bound, f"the held-out loss fell by {fall:.4f}, less than twice {bound:.4f}")

    def _result(self) -> Path:
        return self.run / ("model" if self.combination.method == "full" else "adapter")

    def _ask_and_merge(self, reference: Reference) -> None:
        asked = self._ask("generate", self.run, "tuned", "--test", "1")
        check(len(asked) == len(PROMPTS) + 1 and all(entry["base"] for entry in asked), f"answers {asked}")
        printed = self.commands.call("merge", "merge", self.run, "--output", self.merged)
        check(f"merged: {self.merged}" in printed, printed)
        merged = self._ask("generate-merged", self.merged, "model")
        self.answers = [entry["tuned"] for entry in asked[: len(PROMPTS)]]
        if self.combination.method == "qlora" and self.combination.base == "bf16":
            self.compared["merged_answers"] = "not compared: merged into bf16 weights, trained and asked over their NF4"
            return
        gaps = [
            reference.gap_where_they_part(self.model, a["messages"], a["tuned"], b["model"])
            for a, b in zip(asked, merged, strict=False)
        ]
        self.compared["merged_answers"] = {"logit_gaps_where_they_part": gaps, "bound": self.bounds.logit_gap}
        check(max(gaps) <= self.bounds.logit_gap, f"merged model and run part at gaps {gaps}: {asked}, {merged}")

    def _ask(self, step: str, folder: Path, label: str, *more: str) -> list[dict]:
        file = self.run / f"{step}.json"
        prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
        self.commands.call(step, "generate", folder, *prompts, *more, "--max-new-tokens", NEW_TOKENS, "--json", file)
        answers = json.loads(file.read_text(encoding="utf-8"))
        check(all(entry[label] for entry in answers), f"{step}: an answer is empty: {answers}")
        return answers

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
        """The last one holds what the run's result does, so it answers the same; method full has none to ask."""
        checkpoint = self.run / "checkpoints" / f"checkpoint-{self.size.steps}"
        if self.combination.method == "full":
            words = ["generate", checkpoint, "--prompt", PROMPTS[0]]
            printed = self.commands.call("generate-checkpoint", *words, expect=(2,))
            check("checkpoints of method full only resume a run" in printed, printed)
            return
        asked = self._ask("generate-checkpoint", checkpoint, "tuned")
        check([entry["tuned"] for entry in asked] == self.answers, f"the last checkpoint answers otherwise: {asked}")
        self.commands.call("eval-checkpoint", "eval", checkpoint)
        found = json.loads((self.run / f"eval-{checkpoint.name}.json").read_text(encoding="utf-8"))
        result = json.loads((self.run / "eval.json").read_text(encoding="utf-8"))
        check(abs(found["tuned"]["loss"] - result["tuned"]["loss"]) <= self.bound, f"{found}, {result}")


def _json_or_nothing(line: str) -> dict:
    """A line that is being written is none yet."""
    try:
        return json.loads(line)
    except ValueError:
        return {}
