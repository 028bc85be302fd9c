"""Servers that add an adapter to its base while they serve: which adapters each takes, and by which command.

Read in the sources of vLLM 0.33 and SGLang 0.5.23. What they do not take must be merged.
"""

from dataclasses import dataclass
from pathlib import Path

from fitune.config.adapter_folder import was_trained_in_nf4
from fitune.config.base_model import in_four_bits
from fitune.export.adapter import AdapterFile, Lora, read_adapter

VLLM, SGLANG = "vLLM", "SGLang"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"Of adapters, that vLLM takes as --max-lora-rank. SGLang finds the rank by itself and has no list."
IN_NEITHER = ("trainable_token_indices", "modules_to_save", "use_dora", "rank_pattern", "alpha_pattern")
"""Keys of adapter_config.json. vLLM 0.33 reads patterns; SGLang and older ones scale all modules by one alpha / r,
without a word. SGLang leaves trained tokens and whole modules out without a word too."""
ALL_LINEARS = ("all", "all-linear")
"Of `target_modules`, what SGLang understands beside a list."
FUSED = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"SGLang computes q, k and v in one, gate and up too, and joins their adapters: each with the one that it cannot lack."
NAME = "tuned"
"Of an adapter, in requests; the base has its own."


@dataclass(frozen=True)
class ServedBase:
    """The base of an adapter as a server is told it, a Hub id or a folder, and its revision."""

    model: str
    revision: str | None

    @property
    def flags(self) -> list[str]:
        return ["--revision", self.revision] if self.revision else []


def what_lacks(server: str, file: AdapterFile) -> str:
    """What `server` takes, where this adapter is something else, to be read after its name; '' for one that it takes.

    UsageError for an adapter that is not read at all.
    """
    lora, part = None, _in_neither(file.config)
    if part is None:
        lora = read_adapter(file)  # refuses starts that change the base
        part = "whole modules or trained tokens" if lora.tokens or lora.replaced else None
    if part is None and server == SGLANG:
        part = _not_in_sglang(file.config, lora)
    if part:
        return f"no adapter with {part}"
    rank = file.config.get("r") or 0
    return f"adapters up to rank {RANKS[-1]}, this has {rank}" if server == VLLM and rank > RANKS[-1] else ""


def is_beside_other_weights(adapter: Path, base_config: dict) -> bool:
    """Whether a server adds it to weights that it was not trained beside: to bf16 ones, after training in NF4."""
    return was_trained_in_nf4(adapter) and not in_four_bits(base_config)


def vllm_command(adapter: Path | str, config: dict, base: ServedBase) -> list[str]:
    """For an adapter of this adapter_config.json, which vLLM takes."""
    largest = next(size for size in RANKS if size >= (config.get("r") or 0))
    lora = ["--enable-lora", "--lora-modules", f"{NAME}={adapter}", "--max-lora-rank", str(largest)]
    return ["vllm", "serve", base.model, *base.flags, *lora]


def sglang_command(adapter: Path | str, base: ServedBase) -> list[str]:
    server = ["python", "-m", "sglang.launch_server"]
    return [*server, "--model-path", base.model, *base.flags, "--lora-paths", f"{NAME}={adapter}"]


def _in_neither(config: dict) -> str | None:
    bias = config.get("bias") or "none"  # vLLM refuses any other, whether biases were trained or not
    return next(iter([f"bias {bias}"] * (bias != "none") + [key for key in IN_NEITHER if config.get(key)]), None)


def _not_in_sglang(config: dict, lora: Lora) -> str | None:
    if config.get("use_rslora"):
        return "use_rslora, as it scales by alpha / r"
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets not in ALL_LINEARS:
        return "an expression for target_modules"
    for weight in lora.pairs:
        layer, _, linear = weight.removesuffix(".weight").rpartition(".")
        other = FUSED.get(linear)
        if other and f"{layer}.{other}.weight" not in lora.pairs:
            return f"{linear} and no {other}"
    return None
