"""requirements.lock is made from requirements.txt and leaves nothing unhashed."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITHOUT_HASH = {"torch"}


def _pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", text, re.MULTILINE))


def test_the_lock_has_the_pinned_versions():
    pinned = _pins((ROOT / "requirements.txt").read_text())
    locked = _pins((ROOT / "requirements.lock").read_text())
    assert {name: locked.get(name) for name in pinned if name not in WITHOUT_HASH} == {
        name: version for name, version in pinned.items() if name not in WITHOUT_HASH
    }


def test_every_locked_package_has_hashes():
    text = (ROOT / "requirements.lock").read_text()
    entries = re.split(r"^(?=[A-Za-z0-9_.-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    assert not re.search(r"https?://", text), "packages come from wherever pip is told to look"
