"""`export --gguf` of a real model asks the real llama.cpp, and refuses a file that is not the model."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fitune.config.json_file import read_json, write_json
from fitune.errors import FituneError
from fitune.export import gguf
from fitune.export.gguf import export_gguf
from fitune.export.whole_model import whole_model


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
@pytest.mark.parametrize("damage", ["another rope base", "two layers exchanged"])
def test_a_damaged_gguf_is_refused(train_once, tmp_path, monkeypatch, kind, damage):
    trained = train_once("real", "lora")
    damaged = _damaged(trained.merged, tmp_path / "damaged", damage)
    convert = gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda model, *rest: convert(damaged, *rest))
    with pytest.raises(FituneError, match="not the model that was converted"):
        export_gguf(whole_model(trained.merged, None), tmp_path / "mine", kind)
    assert not (tmp_path / "mine").exists()


def _damaged(model: Path, folder: Path, damage: str) -> Path:
    shutil.copytree(model, folder)
    if damage == "another rope base":
        config = read_json(folder / "config.json", "")
        rope = config["rope_parameters"] | {"rope_theta": 10000.0}
        write_json(folder / "config.json", config | {"rope_parameters": rope, "rope_theta": 10000.0})
        return folder
    [file] = folder.glob("*.safetensors")
    exchanged = {"14": "15", "15": "14"}
    renamed = {
        re.sub(r"(?<=layers\.)(14|15)(?=\.)", lambda found: exchanged[found[0]], name): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(renamed, file, metadata={"format": "pt"})
    return folder
