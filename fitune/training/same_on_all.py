"""Several machines train one run only if they have the same base, data and packages: compared before the first step."""

import importlib.metadata
import os
import socket

import torch.distributed as dist

from fitune import __version__
from fitune.errors import UsageError
from fitune.training.distributed import from_all_ranks
from fitune.training.manifest import PACKAGES, Identity

SHOWN = 12
"Characters of a hash in a message."
WHAT_TO_DO = {
    "base": "copy the same model to all machines, or name a Hub id and revision",
    "data": "copy the same prepared folder to all machines, or keep it on a disk they share",
    "template": "use the same recipe and base on all machines",
    "tokenizer": "copy the same model to all machines, or name a Hub id and revision",
    "version": "install the same versions on all machines",
}


def is_first_of_its_machine() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def refuse_differences(identity: Identity | None, waiting) -> None:
    """Raises UsageError on all ranks if a machine differs from rank 0's, both and the values named. Call on all ranks.

    `identity` is given by one rank of each machine, None by the others. `waiting` is entered where ranks wait.
    """
    if not dist.is_initialized():
        return
    mine = None if identity is None else (socket.gethostname(), _facts(identity))
    if difference := first_difference(from_all_ranks(mine, waiting)):
        raise UsageError(difference)


def first_difference(found: list[tuple[str, dict[str, str]] | None]) -> str | None:
    """What differs from the first rank's (host, facts by name), in one line; None if nothing does."""
    host, facts = found[0]
    for rank, other in enumerate(found):
        if other is None:
            continue
        for name, value in facts.items():
            if other[1].get(name) != value:
                kind = name.split()[0].split(".")[0]
                return (
                    f"the machines differ: {name} is {_short(value)} on {host} (rank 0) and "
                    f"{_short(other[1].get(name))} on {other[0]} (rank {rank}); {WHAT_TO_DO[kind]}"
                )
    return None


def _facts(identity: Identity) -> dict[str, str]:
    """What must be the same, by the names that a message has for them."""
    return {
        **{f"base.{name}": digest for name, digest in sorted(identity.base_fingerprint.items())},
        "data (train.jsonl)": identity.data,
        "template": identity.template,
        "tokenizer": identity.tokenizer,
        "version of fitune": __version__,
        **{f"version of {name}": importlib.metadata.version(name) for name in PACKAGES},
    }


def _short(value: str | None) -> str:
    return "missing" if value is None else value[:SHOWN]
