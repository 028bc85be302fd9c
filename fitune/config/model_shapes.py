"""Sizes of models: from a local or cached config.json, or from the shipped table of the public Llama 3 family."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fitune.config.adapted_linears import ATTENTION, MLP
from fitune.config.base_model import check_config, in_four_bits
from fitune.config.config_types import heads_of
from fitune.config.hub import what_to_give
from fitune.config.json_file import read_json
from fitune.errors import UsageError


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on. Field names are config.json's, shortened."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int
    tied: bool = False
    "One tensor for embedding and head on disk. Method full trains it as one; frozen, memory holds it twice."
    biased: frozenset[str] = frozenset()
    "Linears with a bias."
    head_norms: bool = False
    "Whether the heads of q and k are normed, as in Qwen3."
    nf4_on_disk: bool = False
    "The checkpoint is already quantised."

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Linears of one decoder layer: (output features, input features)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @cached_property
    def layer_linear_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.linears.values())

    @cached_property
    def layer_vector_weights(self) -> int:
        """Of norms and biases, which are never quantised."""
        biases = sum(self.linears[name][0] for name in self.biased)
        return 2 * self.hidden + biases + 2 * self.head_dim * self.head_norms

    @property
    def embedding_weights(self) -> int:
        """Of the embedding; the head has as many."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """As counted on disk."""
        layers = self.layers * (self.layer_linear_weights + self.layer_vector_weights)
        return layers + self.hidden + self.embedding_weights * (1 if self.tied else 2)


_8B = {"hidden": 4096, "intermediate": 14336, "layers": 32, "heads": 32}
_70B = {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64}
_405B = {"hidden": 16384, "intermediate": 53248, "layers": 126, "heads": 128}
_1B = {"hidden": 2048, "intermediate": 8192, "layers": 16, "heads": 32, "head_dim": 64, "tied": True}
_3B = {"hidden": 3072, "intermediate": 8192, "layers": 28, "heads": 24, "tied": True}


def _llama(sizes: dict, max_positions: int) -> ModelShape:
    return ModelShape(**{"kv_heads": 8, "head_dim": 128, "vocabulary": 128256, "max_positions": max_positions} | sizes)


LLAMA_3_FAMILY = {
    "Meta-Llama-3-8B": _llama(_8B, 8192),
    "Meta-Llama-3-70B": _llama(_70B, 8192),
    "Llama-3.1-8B": _llama(_8B, 131072),
    "Llama-3.1-70B": _llama(_70B, 131072),
    "Llama-3.1-405B": _llama(_405B, 131072),
    "Llama-3.2-1B": _llama(_1B, 131072),
    "Llama-3.2-3B": _llama(_3B, 131072),
    "Llama-3.3-70B": _llama(_70B, 131072),
}
"""By the Hub id's last part, without `-Instruct`; the sizes stand in each model's config.json on the Hub."""


def find_shape(model: str, revision: str | None = None) -> ModelShape:
    """The sizes of `model`, a folder or a Hub id. Nothing is downloaded. Raises UsageError in one line."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return read_config(folder / "config.json")
    if folder.exists():
        raise UsageError(f"{model}: is a file; give the model's folder or a Hugging Face id")
    cached = cached_config(model, revision)
    if cached:
        return read_config(cached)
    known = LLAMA_3_FAMILY.get(_family_name(model))
    if known:
        return known
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UsageError(f"{model}: no such folder, so the model's sizes are not known")
    raise UsageError(
        f"{model}: sizes not known: not in the Hub's cache, and not one of {', '.join(LLAMA_3_FAMILY)}; "
        f"run: hf download {model} config.json"
    )


def _family_name(model: str) -> str:
    name = model.rsplit("/", 1)[-1].removesuffix("-Instruct")
    if name not in LLAMA_3_FAMILY and name.startswith("Meta-Llama-3."):
        return name.removeprefix("Meta-")  # 3.1 was first published under this prefix
    return name


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def cached_config(model: str, revision: str | None) -> Path | None:
    """config.json of a Hub id in huggingface_hub's cache, found by its documented layout: no import, no network."""
    repository = hub_cache() / f"models--{model.replace('/', '--')}"
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision or ""
    file = repository / "snapshots" / commit / "config.json"
    return file if commit and file.is_file() else None


def has_weights(model: str, revision: str | None = None) -> bool:
    """Whether `model` is a folder, or its weights are in the Hub's cache, at least in part."""
    cached = cached_config(model, revision)
    return Path(model).expanduser().is_dir() or (cached is not None and any(cached.parent.glob("*.safetensors")))


def read_config(file: Path) -> ModelShape:
    """The sizes in a model's config.json."""
    config = read_json(file, what_to_give(file.parent))
    check_config(config, file)
    try:
        heads = heads_of(config)
        return ModelShape(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads.query,
            kv_heads=heads.key_value,
            head_dim=heads.dim,
            vocabulary=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            tied=bool(config.get("tie_word_embeddings")),
            biased=_biased(config),
            head_norms=config["model_type"] == "qwen3",
            nf4_on_disk=in_four_bits(config),
        )
    except KeyError as error:
        raise UsageError(f"{file}: key {error} is missing") from None


def _biased(config: dict) -> frozenset[str]:
    """The linears that a config.json gives a bias."""
    if config["model_type"] == "qwen2":
        return ATTENTION - {"o_proj"}
    attention = ATTENTION if config["model_type"] != "mistral" and config.get("attention_bias") else frozenset()
    return attention | (MLP if config["model_type"] == "llama" and config.get("mlp_bias") else frozenset())
