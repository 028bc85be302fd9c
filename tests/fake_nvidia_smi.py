"""A program that answers as nvidia-smi would, and the cards it tells of."""

import os
from pathlib import Path

from fitune.planning.hardware import FIELDS, MORE_FIELDS

CARD = ("GPU-{n}", "NVIDIA GeForce RTX 4090", "24564", "24100", "8.9", "4", "16", "[N/A]")
"""uuid, name, memory.total, memory.free, compute_cap, pcie.link.gen.max, pcie.link.width.current, mig.mode.current"""


def card(number: int, **changes: str) -> list[str]:
    values = dict(zip(FIELDS + MORE_FIELDS, CARD, strict=True)) | {"uuid": f"GPU-{number}{number}{number}{number}"}
    return list((values | {key.replace("__", "."): value for key, value in changes.items()}).values())


def put_in_path(
    folder: Path, monkeypatch, rows: list[list[str]], listed: str = "", knows_all_fields: bool = True, xml: str = ""
) -> None:
    """The program tells of `rows`, which `card` makes; of `listed` for -L, and of `xml` for -q -x.

    What it is asked it writes to `folder`/asked.
    """
    csv, short = ("\n".join(", ".join(row[:size]) for row in rows) for size in (None, len(FIELDS)))
    program = folder / "bin" / "nvidia-smi"
    program.parent.mkdir(exist_ok=True)
    refusal = "" if knows_all_fields else 'case "$1" in *compute_cap*) echo "not a valid field"; exit 2;; esac\n'
    program.write_text(
        f'#!/bin/sh\necho "$@" >> {folder / "asked"}\nif [ "$1" = -L ]; then cat <<\'X\'\n{listed}\nX\nexit; fi\n'
        f"if [ \"$1 $2\" = '-q -x' ]; then cat <<'X'\n{xml}\nX\nexit; fi\n{refusal}"
        f"case \"$1\" in *compute_cap*) cat <<'X'\n{csv}\nX\n;; *) cat <<'X'\n{short}\nX\n;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
