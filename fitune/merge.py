"""Merges an adapter into its base: one standard Hugging Face checkpoint, whatever the size of the model.

Tensors stream from the base's safetensors to the output's, one at a time, the arithmetic in fp32 on a few rows at a
time; memory holds the largest tensor plus about half a GiB. The output appears under its name only when it is whole.
"""

import fcntl
import glob
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch

from fitune.checkpoint import Checkpoint, CheckpointWriter, TensorSpec
from fitune.errors import FituneError, UsageError
from fitune.hub import CONFIG_FILES, base_fingerprint, base_mismatch, read_base_record, unpacked_shapes

CHUNK_WEIGHTS = 2**24  # 64 MiB in fp32
COPY_BYTES = 16 * 2**20
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "merges.txt", "vocab.*"]
LICENCE_FILES = ["LICENSE*", "USE_POLICY*", "NOTICE*"]
SMALL_FILES_BYTES = 2**26  # room for tokenizer, configs and licence

NEUTRAL_LORA_KEYS = {
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "r",
    "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_rslora", "trainable_token_indices", "megatron_core", "loftq_config",
    "eva_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
"Keys of adapter_config.json that are read here, or that say nothing about how the adapter is applied."


def merge_adapter(
    base: Path,
    adapter: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = True,
    force: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes base + adapter to the new folder `output` in `dtype` and returns it.

    `base` holds bf16, fp16, fp32 or bitsandbytes 4-bit weights; `adapter` is a PEFT folder with LoRA on linear layers
    and, perhaps, trained token rows. Everything is checked before anything is written: UsageError for folders that do
    not fit, and for a base other than the one in the adapter's fitune_base.json unless `force`; FituneError for damaged
    files and a full disk. A failure or Ctrl-C leaves no output.
    """
    base, adapter, output = Path(base), Path(adapter), Path(output)
    refuse_existing(output)
    config = _base_config(base)
    with Checkpoint(base) as checkpoint, AdapterFile(adapter) as adapter_file:
        weights = BaseWeights(checkpoint)
        lora = read_adapter(adapter_file)
        _check_targets(lora, adapter_file, weights)
        _check_identity(adapter, weights, lora, adapter_file.config, force)
        specs = _output_specs(weights, dtype)
        _check_disk_space(output, sum(spec.nbytes for spec in specs))
        with new_folder(output) as unfinished, _progress_bar(progress) as bar:
            writer = CheckpointWriter(unfinished, specs, max_shard_bytes)
            task = bar.add_task("merging", total=sum(spec.nbytes for spec in specs))
            for spec in specs:
                writer.write(spec.name, _merged(spec, weights, lora, adapter_file))
                bar.advance(task, spec.nbytes)
            writer.close()
            _write_configs(base, adapter, unfinished, config, dtype)
    return output


def merge_full(model: Path, output: Path, *, progress: bool = True) -> Path:
    """Copies the result of method full, a standard checkpoint already, by the same rules. Returns `output`."""
    model, output = Path(model), Path(output)
    refuse_existing(output)
    _base_config(model)
    with Checkpoint(model) as checkpoint:
        shards = sorted({info.file for info in checkpoint.tensors.values()})
    files = shards + _matching(model, CONFIG_FILES)
    total = sum(file.stat().st_size for file in files)
    _check_disk_space(output, total)
    with new_folder(output) as unfinished, _progress_bar(progress) as bar:
        task = bar.add_task("copying", total=total)
        for file in files:
            _copy(file, unfinished, lambda count: bar.advance(task, count))
    return output


class AdapterFile(Checkpoint):
    """The tensors of a PEFT folder, with its adapter_config.json as `config`."""

    def __init__(self, folder: Path):
        self.config = _read_json(folder / "adapter_config.json", "give the folder of a PEFT LoRA adapter")
        super().__init__(folder)

    def _files(self):
        return {self.folder / "adapter_model.safetensors": None}


@dataclass(frozen=True)
class LoraPair:
    """weight += scale * B @ A; `a` and `b` name tensors [r, in] and [out, r] of the adapter file."""

    a: str
    b: str
    scale: float


@dataclass(frozen=True)
class Lora:
    """What an adapter changes, by the base's weight names."""

    pairs: dict[str, LoraPair]
    tokens: dict[str, tuple[str, list[int]]]
    "Weight -> the adapter's tensor [n, hidden] and the n rows that it replaces."


def read_adapter(file: AdapterFile) -> Lora:
    """The adapter's pairs and token rows; UsageError for anything that `merge` would not apply exactly."""
    _refuse_unsupported(file)
    pairs, tokens = {}, {}
    for name in file.tensors:
        module, _, kind = re.sub(r"^base_model\.model\.", "", name).partition(".lora_")
        if kind in ("A.weight", "B.weight"):
            prefix = name.removesuffix(kind)
            pairs[f"{module}.weight"] = LoraPair(f"{prefix}A.weight", f"{prefix}B.weight", _scale(file, module, prefix))
        elif module.endswith(".token_adapter.trainable_tokens_delta"):
            module = module.removesuffix(".token_adapter.trainable_tokens_delta")
            tokens[f"{module}.weight"] = (name, _token_rows(file, module, name))
        else:
            raise UsageError(f"{file[name].file}: tensor {name} is neither LoRA on a linear layer nor token rows")
    if not pairs and not tokens:
        raise UsageError(f"{file.folder}: the adapter holds no tensors")
    return Lora(pairs, tokens)


def _refuse_unsupported(file: AdapterFile) -> None:
    config, where = file.config, file.folder / "adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise UsageError(f"{where}: peft_type {config.get('peft_type')!r} is not supported; merge reads LORA")
    initial = config.get("init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal", "eva"):
        raise UsageError(f"{where}: init_lora_weights={initial!r} changes the base; convert it to plain LoRA with PEFT")
    plain = {"peft_type", "init_lora_weights", "bias" if config.get("bias") == "none" else ""} | NEUTRAL_LORA_KEYS
    for key, value in config.items():
        if value and key not in plain:
            raise UsageError(f"{where}: {key}={value!r} is not supported; merge reads plain LoRA and trained tokens")


def _scale(file: AdapterFile, module: str, prefix: str) -> float:
    """alpha / r as PEFT finds it: per-module patterns first, then the adapter's own values."""
    where = file.folder / "adapter_config.json"
    try:
        r = _by_pattern(file.config.get("rank_pattern"), module, file.config["r"])
        alpha = _by_pattern(file.config.get("alpha_pattern"), module, file.config["lora_alpha"])
        scale = float(alpha) / (math.sqrt(r) if file.config.get("use_rslora") else r)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError, re.error) as error:
        raise UsageError(f"{where}: r, lora_alpha or their patterns are unusable: {error!r}") from None
    a, b = file[f"{prefix}A.weight"], file[f"{prefix}B.weight"]
    if len(a.shape) != 2 or len(b.shape) != 2 or not a.shape[0] == b.shape[1] == r:
        raise UsageError(f"{a.file}: {module}: lora_A {a.shape} and lora_B {b.shape} do not have rank {r} of {where}")
    return scale


def _by_pattern(patterns: dict | None, module: str, default):
    return next((v for key, v in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _token_rows(file: AdapterFile, module: str, name: str) -> list[int]:
    """Token ids in the order of the tensor's rows. PEFT writes one list for the embedding, or one per module."""
    indices = file.config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((ids for key, ids in indices.items() if f".{module}".endswith(f".{key}")), None)
    is_list = isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices)
    if not is_list or (len(indices),) != file[name].shape[:1]:
        raise UsageError(f"{file.folder / 'adapter_config.json'}: trainable_token_indices does not match tensor {name}")
    return indices


class BaseWeights:
    """The base's weights by name, 4-bit ones unpacked, a few rows at a time."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        shapes = unpacked_shapes(checkpoint)
        self.shapes = {n: shape for n, shape in shapes.items() if not n.endswith("rotary_emb.inv_freq")}  # a constant
        self._state_name, self._state = None, None

    def dtype(self, name: str) -> torch.dtype | None:
        """As stored; None for 4-bit weights."""
        return None if self._is_packed(name) else self.checkpoint[name].dtype

    def row_chunks(self, name: str) -> list[tuple[int, int]]:
        """[start, stop) of about CHUNK_WEIGHTS weights; cuts of a 4-bit weight fall between quantisation blocks."""
        rows, width = self.shapes[name][0], math.prod(self.shapes[name][1:])
        step = max(1, CHUNK_WEIGHTS // max(1, width))
        if self._is_packed(name):
            unit = self._quant_state(name).blocksize
            unit //= math.gcd(unit, width)
            step = -(-step // unit) * unit
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as stored, or in the dtype a 4-bit weight was quantised from."""
        if not self._is_packed(name):
            return self.checkpoint.read_rows(name, start, stop)
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state, width = self._quant_state(name), math.prod(self.shapes[name][1:])
        first, last = start * width, stop * width
        part = QuantState(
            absmax=state.absmax[first // state.blocksize : -(-last // state.blocksize)],
            shape=torch.Size((stop - start, width)),
            dtype=state.dtype,
            blocksize=state.blocksize,
            code=state.code,
            quant_type=state.quant_type,
        )
        packed = self.checkpoint.read_bytes(name, first // 2, -(-last // 2))
        return dequantize_4bit(packed.view(-1, 1), part)

    def _is_packed(self, name: str) -> bool:
        return any(f"{name}.quant_state.bitsandbytes__{kind}" in self.checkpoint for kind in ("nf4", "fp4"))

    def _quant_state(self, name: str):
        """bitsandbytes' QuantState of a packed weight, its absmax in fp32."""
        if self._state_name != name:
            from bitsandbytes.functional import QuantState, dequantize_blockwise

            parts = {n: self.checkpoint.read(n) for n in self.checkpoint.tensors if n.startswith(f"{name}.")}
            try:
                state = QuantState.from_dict(parts, device=torch.device("cpu"))
                if state.nested:
                    state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
            except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise FituneError(f"{self.checkpoint[name].file}: tensor {name}: broken quant state: {error}") from None
            self._state_name, self._state = name, state
        return self._state


def _merged(spec: TensorSpec, weights: BaseWeights, lora: Lora, file: AdapterFile) -> torch.Tensor:
    """One output tensor: the base's weight plus scale * B @ A in fp32, or the trained rows, then cast."""
    pair, tokens = lora.pairs.get(spec.name), lora.tokens.get(spec.name)
    if not pair and not tokens and weights.dtype(spec.name) == spec.dtype:
        return weights.checkpoint.read(spec.name)
    merged = torch.empty(spec.shape, dtype=spec.dtype)
    a, b = (file.read(pair.a).float(), file.read(pair.b).float()) if pair else (None, None)
    for start, stop in weights.row_chunks(spec.name):
        chunk = weights.rows(spec.name, start, stop).to(torch.float32, copy=True)
        if pair:
            chunk.addmm_(b[start:stop], a, alpha=pair.scale)
        merged[start:stop] = chunk
    if tokens:
        merged[tokens[1]] = file.read(tokens[0]).to(spec.dtype)
    for start, stop in weights.row_chunks(spec.name):
        if not merged[start:stop].isfinite().all():
            raise FituneError(
                f"tensor {spec.name}: not finite in {spec.dtype} after the merge; "
                f"the adapter or the base holds NaN or inf, or values too large for that dtype"
            )
    return merged


def _output_specs(weights: BaseWeights, dtype: torch.dtype) -> list[TensorSpec]:
    """Every weight once; floating-point ones in `dtype`."""
    specs = []
    for name, shape in weights.shapes.items():
        stored = weights.dtype(name)
        keep = stored is not None and (not stored.is_floating_point or not shape)
        specs.append(TensorSpec(name, stored if keep else dtype, shape))
    return specs


def _check_targets(lora: Lora, file: AdapterFile, weights: BaseWeights) -> None:
    """Every tensor of the adapter fits a weight of the base."""
    where, base = file.folder / "adapter_model.safetensors", weights.checkpoint.folder
    for name in [*lora.pairs, *lora.tokens]:
        if name not in weights.shapes:
            raise UsageError(f"{where}: adapts {name}, which {base} does not have; give the base it was trained on")
        needed = weights.shapes[name]
        if name in lora.pairs:
            given = (file[lora.pairs[name].b].shape[0], file[lora.pairs[name].a].shape[1])
            fits = given == needed
        else:
            tensor, rows = lora.tokens[name]
            given = file[tensor].shape
            fits = given[1:] == needed[1:] and max(rows) < needed[0]
        if not fits:
            raise UsageError(f"{where}: {name}: the adapter is for shape {given}, {base} has {needed}; wrong base?")


def _check_identity(adapter: Path, weights: BaseWeights, lora: Lora, config: dict, force: bool) -> None:
    """Refuses a base that is not the adapter's own, as far as names, shapes and the adapter's record tell."""
    record, base = read_base_record(adapter), weights.checkpoint.folder
    if record is not None:
        doubt = base_mismatch(record, base_fingerprint(weights.checkpoint))
    else:
        doubt = _unadapted(weights, lora, config)
    if doubt and not force:
        raise UsageError(f"{base}: {doubt}; give the adapter's own base, or --force if you know that they fit")
    if doubt:
        print(f"warning: {base}: {doubt}; merging all the same (--force), unknown whether they fit", file=sys.stderr)
    elif record is None:
        print(f"note: {adapter}: no record of its base; only names and shapes were compared", file=sys.stderr)


def _unadapted(weights: BaseWeights, lora: Lora, config: dict) -> str | None:
    """A linear layer of the base that the adapter means to adapt, and does not: a base with more layers."""
    targets = config.get("target_modules")
    if not isinstance(targets, list) or config.get("layers_to_transform") or config.get("exclude_modules"):
        return None
    for name in weights.shapes:
        module = name.removesuffix(".weight")
        if module != name and name not in lora.pairs and any(f".{module}".endswith(f".{t}") for t in targets):
            return f"has {name}, which the adapter does not cover"
    return None


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` once the block is through, and vanishes if it fails.

    Files are flushed to disk before the rename, so `output` is whole whenever it exists; modes follow the umask. What
    a killed process left of the same output is removed. Raises UsageError if `output` exists or cannot be created, and
    FituneError where the disk fails.
    """
    output = Path(output).absolute()
    refuse_existing(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        unfinished = output.parent / f".{output.name}.{uuid4().hex[:8]}.unfinished"
        unfinished.mkdir()
        lock = os.open(unfinished, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{output}: cannot be created: {error.strerror}; give another output") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield unfinished
        for path in [*unfinished.rglob("*"), unfinished]:
            _sync(path)
        refuse_existing(output)
        unfinished.rename(output)
        _sync(output.parent)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError):
            raise FituneError(f"{output}: not written: {error}; nothing was left behind") from error
        raise
    finally:
        os.close(lock)


def refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise UsageError(f"{output}: exists already; give a new folder, nothing is overwritten")


def _remove_leftovers(output: Path) -> None:
    """Unfinished folders of `output` whose process is gone: the kernel has released its lock."""
    for folder in output.parent.glob(f".{glob.escape(output.name)}.????????.unfinished"):
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            pass  # another process is at work on the same output
        finally:
            os.close(lock)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_disk_space(output: Path, nbytes: int) -> None:
    parent = Path(output).absolute().parent
    while not parent.exists():
        parent = parent.parent
    needed, free = nbytes + SMALL_FILES_BYTES, shutil.disk_usage(parent).free
    if free < needed:
        raise FituneError(
            f"{output}: needs {needed / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} GiB free; "
            f"free some space or give an output on another disk"
        )


def _read_json(file: Path, hint: str) -> dict:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no such file; {hint}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{file}: holds a {type(data).__name__}, not an object; {hint}")
    return data


def _base_config(base: Path) -> dict:
    """The base's config.json; UsageError for weights quantised in a way that cannot be read."""
    config = _read_json(base / "config.json", "give a folder with config.json and *.safetensors")
    quantised = config.get("quantization_config")
    if quantised and not (quantised.get("quant_method") == "bitsandbytes" and quantised.get("load_in_4bit")):
        method = quantised.get("quant_method")
        raise UsageError(f"{base}: quantised with {method!r}; merge reads bf16, fp16, fp32 and bitsandbytes 4-bit")
    return config


def _write_configs(base: Path, adapter: Path, output: Path, config: dict, dtype: torch.dtype) -> None:
    """config.json, tokenizer, chat template, generation_config.json and licence: the adapter's where it has them."""
    has_tokenizer = (adapter / "tokenizer.json").exists() or (adapter / "tokenizer_config.json").exists()
    for file in _matching(base, LICENCE_FILES) + _matching(adapter if has_tokenizer else base, TOKENIZER_FILES):
        _copy(file, output)
    tokenizer_config = _read_json_if_there(output / "tokenizer_config.json")
    templates = [adapter / "chat_template.jinja"]
    if "chat_template" not in tokenizer_config:
        templates.append(base / "chat_template.jinja")
    template = next((file for file in templates if file.exists()), None)
    if template:
        _copy(template, output)
    name = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key not in ("quantization_config", "_name_or_path")}
    config |= {"dtype": name, "use_cache": True} | ({"torch_dtype": name} if "torch_dtype" in config else {})
    _write_json(output / "config.json", config)
    generation = _read_json_if_there(adapter / "generation_config.json")
    generation = generation or _read_json_if_there(base / "generation_config.json")
    generation["eos_token_id"] = _stop_tokens(output, config, generation, tokenizer_config)
    _write_json(output / "generation_config.json", generation)


def _stop_tokens(output: Path, config: dict, generation: dict, tokenizer_config: dict) -> list[int]:
    """Ids that end an answer: the generation config's, else config.json's, and the chat template's end of turn."""
    stop = generation.get("eos_token_id", config.get("eos_token_id"))
    stop = list(stop) if isinstance(stop, list) else [stop] if stop is not None else []
    template = output / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.exists() else str(tokenizer_config.get("chat_template"))
    added = _read_json_if_there(output / "tokenizer.json").get("added_tokens", [])
    end_of_turn = [token["id"] for token in added if token["content"] == "<|eot_id|>" and token["content"] in text]
    return list(dict.fromkeys(stop + end_of_turn))


def _read_json_if_there(file: Path) -> dict:
    return _read_json(file, "remove it or write it again") if file.exists() else {}


def _write_json(file: Path, data: dict) -> None:
    file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _matching(folder: Path, patterns: list[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _copy(file: Path, folder: Path, on_bytes: Callable[[int], object] = id) -> None:
    """Content only, in blocks: the copy's mode follows the umask, and a link becomes a file."""
    with file.open("rb") as source, (folder / file.name).open("wb") as target:
        while block := source.read(COPY_BYTES):
            target.write(block)
            on_bytes(len(block))


def _progress_bar(enabled: bool):
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    console = Console(stderr=True)
    return Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, disable=not enabled)
