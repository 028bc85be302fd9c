"""A tiny, untrained base model of Llama 3's architecture, for the demo and the tests.

    python -m fitune.demo.tiny_base OUTPUT_FOLDER [--seed 0]

The true parts: grouped-query attention, rotary positions (theta 500000), RMSNorm, SwiGLU, an untied head; a byte-level
BPE tokenizer with Llama 3's splitting pattern, its special tokens by name and its chat template. The small parts: 2,048
tokens, learned from examples/instructions, and 1.3 million random weights. The same arguments give the same bytes.
"""

import argparse
import copy
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from fitune.config import run as runs
from fitune.config.shipped import EXAMPLES
from fitune.data.chat_template import training_template
from fitune.errors import FituneError, UsageError
from fitune.output_folder import new_folder, refuse_existing

DEMO_BASE = Path("models/tiny-base")
"The base of the shipped tiny recipes, in the working folder."
TEXTS = EXAMPLES / "instructions" / "instructions.jsonl"
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
SPECIAL_TOKENS = [
    BOS,
    EOS,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PAD,
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
]
"In the order of Llama 3.1, whose special tokens also follow the learned ones."


def make_demo_base(recipe: str, sets: tuple[str, ...]) -> None:
    """The base of the tiny recipes and of those that extend them, where `prepare` is the first to need it.

    Says so on stderr.
    """
    if DEMO_BASE.exists():
        return
    model = runs.load_recipe(recipe, runs.parse_sets(sets)[0]).base.model
    if Path(model) == DEMO_BASE:
        print(f"{build_tiny_base(DEMO_BASE)}: made, the tiny Llama base model of {recipe}, untrained", file=sys.stderr)


def build_tiny_base(
    folder: Path,
    *,
    texts: Iterable[str] | None = None,
    vocab_size: int = 2048,
    hidden_size: int = 128,
    intermediate_size: int = 384,
    num_layers: int = 4,
    num_heads: int = 8,
    num_kv_heads: int = 4,
    seed: int = 0,
    dtype=None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes model, tokenizer and generation config to the new `folder` and returns it.

    `texts` train the tokenizer (default: the shipped examples); `dtype` is the stored torch dtype (default bfloat16).
    Where the texts yield fewer tokens than `vocab_size`, reserved special tokens fill up the rest. The random weights
    give a loss of about ln(vocab_size). Raises UsageError if `folder` exists or the sizes do not fit together.
    """
    import torch

    refuse_existing(Path(folder))
    _check_sizes(vocab_size, hidden_size, num_heads, num_kv_heads)
    tokenizer = _train_tokenizer(_example_texts() if texts is None else texts, vocab_size)
    config = _config(tokenizer, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads)
    config.dtype = dtype or torch.bfloat16
    weights = _random_weights(config, seed)
    with new_folder(Path(folder)) as unfinished:
        _write_weights(unfinished, weights, max_shard_bytes)
        config.save_pretrained(unfinished)
        _generation_config(tokenizer).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return Path(folder)


def _check_sizes(vocab_size: int, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise UsageError(f"vocab_size {vocab_size}: needs at least {256 + len(SPECIAL_TOKENS)}: bytes, special tokens")
    if hidden_size % (2 * num_heads):
        raise UsageError(f"hidden_size {hidden_size}: must be a multiple of 2 x num_heads = {2 * num_heads}")
    if num_heads % num_kv_heads:
        raise UsageError(f"num_heads {num_heads}: must be a multiple of num_kv_heads {num_kv_heads}")


def _example_texts() -> Iterator[str]:
    """The message contents of the shipped examples."""
    try:
        lines = TEXTS.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UsageError(f"{TEXTS}: no such file; install fitune again") from None
    for line in lines:
        for message in json.loads(line)["messages"]:
            yield message["content"]


def _train_tokenizer(texts: Iterable[str], vocab_size: int):
    """A PreTrainedTokenizerFast with exactly `vocab_size` tokens that puts one BOS before a text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    missing = vocab_size - backend.get_vocab_size() - len(SPECIAL_TOKENS)
    filling = [f"<|reserved_special_token_{3 + i}|>" for i in range(missing)]
    specials = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS + filling]
    backend.add_special_tokens(specials)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=training_template("llama3"),
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def _config(tokenizer, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _generation_config(tokenizer):
    """Greedy, and stopping at the end of a text or of a turn."""
    from transformers import GenerationConfig

    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|eot_id|>")],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )


def _random_weights(config, seed: int) -> dict:
    """Tensors sorted by name, drawn in fp32, so that a seed means the same model in every dtype, then cast."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    # 0.02 suits a width of thousands; at 128 it keeps every logit below 3, and an adapter can't scale a frozen head
    model.lm_head.weight.data *= config.hidden_size**-0.5 / config.initializer_range
    return {name: weight.to(config.dtype) for name, weight in sorted(model.state_dict().items())}


def _write_weights(folder: Path, weights: dict, max_shard_bytes: int) -> None:
    from fitune.weights.safetensors_files import CheckpointWriter, TensorSpec

    specs = [TensorSpec(name, weight.dtype, tuple(weight.shape)) for name, weight in weights.items()]
    writer = CheckpointWriter(folder, specs, max_shard_bytes)
    for name, weight in weights.items():
        writer.write(name, weight)
    writer.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fitune.demo.tiny_base", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="OUTPUT_FOLDER", help="new folder for the model")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    arguments = parser.parse_args()
    try:
        folder = build_tiny_base(arguments.folder, seed=arguments.seed)
    except FituneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{folder}: tiny Llama base model, untrained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
