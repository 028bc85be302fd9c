"""docs/keys.md holds every key that recipes, profiles and accelerate configs may have."""

import re
import subprocess
import sys
from pathlib import Path

import yaml

from fitune.config.shipped import ACCELERATE_CONFIGS, PROFILES, RECIPES
from tests.pages import keys_in

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "keys.md"
OF_ACCELERATE = {
    *("distributed_type", "fsdp_config", "fsdp_config.fsdp_version"),
    *("machine_rank", "main_process_ip", "main_process_port"),
}
"What the text above the table of accelerate's keys says."
NAMES_OF_THE_USER = re.compile(r"^(fits|expected|micro_batch|data\.(columns|keep))\.")


def test_the_page_is_what_the_schema_says():
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "keys.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_key_of_the_shipped_files_is_on_the_page():
    listed = set(re.findall(r"^\| `([\w.]+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M))
    folders = (RECIPES, PROFILES, ACCELERATE_CONFIGS)
    used = {
        (file.name, key)
        for folder in folders
        for file in folder.glob("*.yaml")
        for key in keys_in(yaml.safe_load(file.read_text(encoding="utf-8")))
        if not NAMES_OF_THE_USER.match(key)
    }
    assert len(used) > 100
    missing = {(file, key) for file, key in used if key not in listed | OF_ACCELERATE}
    assert not missing
