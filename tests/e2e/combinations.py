"""What is trained: combinations of method, ranks, offload and packing that cover every pair of them that matters."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Combination:
    """One run: a shipped recipe under a shipped profile, with `--set`."""

    name: str
    method: Literal["qlora", "lora", "full"]
    profile: str
    packing: bool
    base: Literal["bf16", "nf4", "untied"] = "bf16"
    "The folder that is trained on. QLoRA quantises bf16 while it loads."
    ranks: int = 1
    sets: dict[str, object] = field(default_factory=dict)
    thorough: bool = False
    "Also trains without an interruption, asks a checkpoint, and holds conversations with run and merged model."

    @property
    def trained_over(self) -> Literal["bf16", "nf4"]:
        """How the frozen weights are, or the first ones that method full changes."""
        return "nf4" if self.method == "qlora" else "bf16"


INPUTS_IN_RAM = {"profile.activation_offload": "true", "profile.kept_layers": 10}
ATTENTION_IN_RAM = INPUTS_IN_RAM | {"profile.kept_attention": "true"}
# The longest come first: they are begun in this order.
# The real model's head is its embedding; the copy called untied has one of its own.
ON_GPUS = [
    Combination("qlora-1", "qlora", "single_gpu", True, "nf4", thorough=True),
    Combination("lora-1-embedding", "lora", "fsdp_1x48gb", True, "bf16", thorough=True),
    Combination("full-2", "full", "fsdp_2x80gb", True, "bf16", 2, {"profile.replicas": "1"}, thorough=True),
    Combination("qlora-4-embedding", "qlora", "fsdp_4x24gb", True, "nf4", 4, {"profile.embedding_offload": "true"}),
    Combination("qlora-4-offloaded", "qlora", "fsdp_offload_4gpu", True, "bf16", 4),
    Combination("lora-4-offloaded", "lora", "fsdp_offload_4gpu", True, "bf16", 4),
    Combination("full-4", "full", "fsdp_4x48gb", False, "untied", 4, {"profile.replicas": "2"}),
    Combination("qlora-2", "qlora", "fsdp_2x40gb", False, "bf16", 2, {"profile.replicas": "1"}),
    Combination("lora-2-copies", "lora", "fsdp_2x40gb", True, "bf16", 2, {"profile.replicas": "2"}),
    Combination("lora-2-embedding", "lora", "fsdp_2x40gb", False, "bf16", 2, {"profile.embedding_offload": "true"}),
    Combination("full-1-offloaded", "full", "fsdp_offload_1x80gb", False, "bf16", 1, INPUTS_IN_RAM),
    Combination(
        "full-1", "full", "fsdp_offload_1x80gb", True, "untied", 1, {"profile.accelerate_config": "single_gpu"}
    ),
    Combination("qlora-1-offloaded", "qlora", "fsdp_offload_1x24gb", False, "nf4", 1, ATTENTION_IN_RAM),
    Combination("lora-1", "lora", "fsdp_1x48gb", False, "bf16", 1, {"profile.embedding_offload": "false"}),
]
ON_CPU = [
    Combination("lora-2-offloaded", "lora", "cpu_2proc", True, "bf16", 2),
    Combination("qlora-1", "qlora", "cpu_2proc", True, "nf4", thorough=True),
    Combination("full-2", "full", "cpu_2proc", True, "bf16", 2),
    Combination("lora-2-embedding", "lora", "cpu_2proc", False, "bf16", 2, {"profile.embedding_offload": "true"}),
]
