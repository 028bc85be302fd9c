"""How a model folder's weights are stored, by small files beside them and the headers of its safetensors.

Old GPTQ and AWQ models, and those of ModelOpt, don't say in config.json that they are quantised.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from fitune.errors import UsageError

ADVICE = (
    "fitune reads bf16, fp16, fp32 and bitsandbytes' 4 bits: give the model that it was made from, and method qlora "
    "quantises that one"
)
_FILES = {"hf_quant_config.json": "ModelOpt", "quantize_config.json": "GPTQ", "quant_config.json": "AWQ"}
_NUMBERS = ("F8", "F6", "F4")
"How the names of dtypes with a few bits begin."
_PARTS = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv", ".SCB")
"Of a linear that is stored in pieces: GPTQ's and AWQ's, compressed-tensors', fp8's, bitsandbytes' 8 bits."
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"The names of these two tensors; where the head is the embedding, the second is missing."


def check_stored_weights(folder: Path, *, tied: bool) -> None:
    """Raises UsageError for weights that are quantised in a way that is not read, and for a head that is not there.

    Nothing but headers is read. A folder without weights, as long as they are not downloaded, is judged by its small
    files. A damaged file is left to who reads its weights. `tied`: the head is the embedding.
    """
    for name, kind in _FILES.items():
        if (folder / name).is_file():
            raise UsageError(f"{folder / name}: weights that are quantised by {kind}; {ADVICE}")
    names = _names_in_index(folder / INDEX_NAME)
    for file in sorted(folder.glob("model*.safetensors")):
        for name, dtype in _stored(file):
            if dtype.startswith(_NUMBERS) or name.endswith(_PARTS):
                raise UsageError(f"{file}: tensor {name} ({dtype}) is quantised; {ADVICE}")
            if file.name == "model.safetensors":
                names.append(name)
    if not tied and EMBEDDING in names and HEAD not in names:
        raise UsageError(
            f"{folder}: its weights have no {HEAD}, and config.json does not say that the embedding stands in for it; "
            f"set tie_word_embeddings to true there if it does"
        )


def _names_in_index(file: Path) -> list[str]:
    """Of the tensors of a model in several files."""
    try:
        return list(json.loads(file.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _stored(file: Path) -> Iterator[tuple[str, str]]:
    """Name and dtype of each tensor."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= MAX_HEADER_BYTES else {}
        header.pop("__metadata__", None)
        yield from ((name, entry["dtype"]) for name, entry in header.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
