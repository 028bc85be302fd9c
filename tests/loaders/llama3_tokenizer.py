"""Llama 3's own tokenizer as a usual folder, from the package in which Meta brings it.

    python tests/loaders/llama3_tokenizer.py OUTPUT      downloads 7 MB, writes 17 MB

The converter to GGUF knows tokenizers by what they make of a text; the tests' own tiny one it refuses.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, READER = "llama-models==0.3.0", ("tiktoken==0.14.0", "regex==2026.11.19")
FIRST = "<|begin_of_text|>"
NAMED = [FIRST, "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
NAMED += ["<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
NAMED += ["<|eot_id|>", "<|python_tag|>"]
SPECIAL = [*NAMED, *(f"<|reserved_special_token_{n}|>" for n in range(2, 2 + 256 - len(NAMED)))]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"How a text is split before its bytes are paired, as Meta's llama_models/llama3/tokenizer.py says."


def make_tokenizer(output: Path) -> None:
    """Writes the folder. The packages go to a temporary one, nothing is installed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", folder, PACKAGE], check=True)
        subprocess.run([*pip, "install", "--no-deps", "--target", folder / "reader", *READER], check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extract("llama_models/llama3/tokenizer.model", folder)
        sys.path.insert(0, str(folder / "reader"))  # transformers imports it when it reads such a file
        _convert(folder / "llama_models" / "llama3" / "tokenizer.model", output)


def _convert(file: Path, output: Path) -> None:
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    encoder = TikTokenConverter(vocab_file=str(file), pattern=WORDS, extra_special_tokens=SPECIAL).converted()
    begin = TemplateProcessing(
        single=f"{FIRST} $A", pair=f"{FIRST} $A {FIRST} $B", special_tokens=[(FIRST, encoder.token_to_id(FIRST))]
    )
    encoder.post_processor = Sequence([ByteLevel(trim_offsets=False), begin])
    PreTrainedTokenizerFast(
        tokenizer_object=encoder, bos_token=FIRST, eos_token="<|end_of_text|>", clean_up_tokenization_spaces=True
    ).save_pretrained(output)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/loaders/llama3_tokenizer.py OUTPUT")
    make_tokenizer(Path(sys.argv[1]))
