"""manifest.json: every file of a checkpoint with its size and SHA-256, and what the checkpoint was trained from.

It is written last, while the folder still has its temporary name. A checkpoint whose manifest does not hold is none.
"""

import hashlib
import importlib.metadata
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch.distributed as dist
from pydantic import ValidationError

from fitune.config.fields import Strict
from fitune.config.schema import Run
from fitune.data.chat_template import template_hash, tokenizer_hash
from fitune.data.prepared import sha256_of_rows
from fitune.errors import UsageError
from fitune.training.distributed import from_all_ranks, from_rank_0
from fitune.weights.base_identity import BaseRecord

MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")


class Identity(Strict):
    """What must be the same in a checkpoint and in the run that goes on from it. Hashes are SHA-256."""

    base: str
    revision: str | None
    "The Hub's commit where it is known."
    base_fingerprint: dict[str, str]
    data: str
    "Of train.jsonl."
    template: str
    tokenizer: str
    seed: int


class Geometry(Strict):
    """How a global batch is dealt out. Only the global batch must be the same to go on."""

    world_size: int
    shards: int | None = None
    "Ranks that held one copy of the model between them; None in checkpoints of earlier versions: all."
    micro_batch: int
    gradient_accumulation_steps: int
    global_batch_size: int


class SavedFile(Strict):
    """One file of a checkpoint."""

    bytes: int
    sha256: str


class Manifest(Strict):
    """The contents of manifest.json."""

    version: Literal[1] = 1
    step: int
    "Optimizer steps done."
    samples: int
    "Rows consumed, all epochs together."
    geometry: Geometry
    identity: Identity
    versions: dict[str, str]
    files: dict[str, SavedFile]
    "By path inside the checkpoint."


def identify(run: Run, base: BaseRecord, tokenizer) -> Identity:
    """The identity of a run."""
    return Identity(
        base=base.model,
        revision=base.revision,
        base_fingerprint=base.fingerprint,
        data=sha256_of_rows(Path(run.recipe.data.prepared), "train"),
        template=template_hash(tokenizer),
        tokenizer=tokenizer_hash(tokenizer),
        seed=run.recipe.seed,
    )


def write_manifest(folder: Path, step: int, run: Run, identity: Identity, saved: dict[str, SavedFile]) -> None:
    """`saved` is what all ranks have written: one may not see another machine's files yet. Adds what else is there."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    files = saved | {name: describe(folder / name) for name in found - set(saved)}
    manifest = Manifest(
        step=step,
        samples=step * run.recipe.global_batch_size,
        geometry=Geometry(
            world_size=run.accelerate.num_processes,
            shards=run.shards,
            micro_batch=run.profile.micro_batch,
            gradient_accumulation_steps=run.gradient_accumulation_steps,
            global_batch_size=run.recipe.global_batch_size,
        ),
        identity=identity,
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
        files=dict(sorted(files.items())),
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Raises ValueError that says what is wrong with it."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"no {MANIFEST}: not written by fitune, or never finished") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST}: {error.strerror}") from None
    except ValidationError as error:
        raise ValueError(f"{MANIFEST}: {error.errors()[0]['msg']}") from None


def find_damage(folder: Path, waiting=nullcontext) -> str | None:
    """What is wrong with the checkpoint in `folder`, None if it is whole. Call on all ranks: they share the reading.

    `waiting` is entered where they wait for each other.
    """
    try:
        manifest, error = read_manifest(folder), None
    except ValueError as problem:
        manifest, error = None, str(problem)
    with waiting():
        manifest, error = from_rank_0((manifest, error))
    if error:
        return error
    shards = manifest.geometry.shards or manifest.geometry.world_size
    for shard in range(shards):
        state = f"state/rank-{shard:05d}-of-{shards:05d}/model.safetensors"
        if state not in manifest.files:
            return f"{state} is not in {MANIFEST}"
    files = list(manifest.files.items())
    own = files[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else files
    found = [damage for part in from_all_ranks(_compare(folder, own), waiting) for damage in part]
    return min(found, default=None)


def refuse_another_identity(checkpoint: Path, identity: Identity) -> None:
    """Raises UsageError if the checkpoint was trained from something else, old and new named."""
    before = read_manifest(checkpoint).identity
    for key, saved in before:
        now = getattr(identity, key)
        if saved != now and not (key == "base" and _is_moved_base(before, identity)):
            weights = f" (the weights in {identity.base} have changed)" * (key == "base_fingerprint")
            raise UsageError(
                f"{checkpoint}: trained with {key} {_short(saved)}, this run has {_short(now)}{weights}: not the same "
                f"run; restore what was changed, or train into another --output"
            )


def _is_moved_base(before: Identity, now: Identity) -> bool:
    """Whether a local base has another path only, as seen from another working folder."""
    return Path(now.base).is_dir() and before.base_fingerprint == now.base_fingerprint


def describe(path: Path, sha256: str | None = None) -> SavedFile:
    """A file that was written; small ones, whose hash is not known, are read for it."""
    if sha256 is None:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return SavedFile(bytes=path.stat().st_size, sha256=sha256)


def _compare(folder: Path, files: list[tuple[str, SavedFile]]) -> list[str]:
    with ThreadPoolExecutor() as threads:
        return [damage for damage in threads.map(lambda file: _damage(folder, *file), files) if damage]


def _damage(folder: Path, name: str, saved: SavedFile) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != saved.bytes:
        return f"{name} has {path.stat().st_size} bytes, not {saved.bytes}"
    return f"{name} has other contents than were written" if describe(path) != saved else None


def _short(value) -> str:
    """A hash cut to what tells it from others; of a fingerprint's hashes the last."""
    text = str(list(value.values())[-1] if isinstance(value, dict) else value)
    return text[:12] if len(text) == 64 else text
