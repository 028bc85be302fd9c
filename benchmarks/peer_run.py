"""One peer on the work of `benchmarks/peers.py`, on rows of random tokens.

    python benchmarks/peer_run.py trl|unsloth MODEL --rows-a-pass 8 --recompute yes|no [--rows 8] [--length 3072]
    accelerate launch --config_file benchmarks/peer_fsdp2.yaml benchmarks/peer_run.py trl MODEL --method full …

On one GPU by QLoRA of a Llama in NF4; over several in full, by accelerate's FSDP2. The last line printed is JSON:
tokens a second of a GPU by the median step, GiB allocated.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from itertools import pairwise

SEED = 0
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=["trl", "unsloth"])
    parser.add_argument("model")
    parser.add_argument("--method", choices=["qlora", "full"], default="qlora")
    parser.add_argument("--rows-a-pass", type=int, required=True, help="Of a GPU.")
    parser.add_argument("--recompute", choices=["yes", "no"], required=True)
    parser.add_argument("--rows", type=int, default=8, help="Of a step. [default: 8]")
    parser.add_argument("--steps", type=int, default=6, help="The first is not timed. [default: 6]")
    parser.add_argument("--length", type=int, default=3072, help="Tokens of a row. [default: 3072]")
    parser.add_argument("--cap", type=float, help="GiB for torch. [default: the whole card]")
    parser.add_argument("--dropout", type=float, default=0.0)
    options = parser.parse_args()
    if options.peer == "unsloth":
        import unsloth  # noqa: F401  (before transformers, or it does not patch)
    import torch

    if options.cap:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap * 2**30 / whole, int(os.environ.get("LOCAL_RANK", 0)))
    load = {"unsloth": _unsloth, "trl": _trl_full if options.method == "full" else _trl}[options.peer]
    seconds = _train(options, *load(options))
    tokens = options.rows * options.length / _gpus()
    report = {
        "tokens_per_second": round(tokens / statistics.median(seconds)),
        "step_seconds": [round(second, 3) for second in seconds],
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(report))


def _gpus() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _unsloth(options):
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(options.model, max_seq_length=options.length, load_in_4bit=True)
    recompute = "unsloth" if options.recompute == "yes" else False
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, lora_dropout=options.dropout, target_modules=LINEARS,
        use_gradient_checkpointing=recompute,
    )  # fmt: skip
    return model, None


def _trl(options):
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, device_map={"": 0})
    adapter = LoraConfig(
        r=16, lora_alpha=16, lora_dropout=options.dropout, target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    return model, adapter


def _trl_full(options):
    """Weights in float32, gathered and multiplied in bf16: mixed precision."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), None


def _train(options, model, adapter) -> list[float]:
    """Seconds of each step but the first."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(128004)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, 128000, (options.rows * (options.steps + 1), options.length), generator=generator).tolist()
    marks = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

    stock = options.peer == "trl"
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.rows_a_pass,
            gradient_accumulation_steps=options.rows // options.rows_a_pass // _gpus(), learning_rate=1e-4,
            logging_steps=1, save_strategy="no", report_to=[], bf16=True, max_length=options.length,
            use_liger_kernel=stock,
            gradient_checkpointing=stock and options.recompute == "yes" and _gpus() == 1,  # else accelerate's
            gradient_checkpointing_kwargs={"use_reentrant": False}, optim="adamw_torch_fused", disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )  # fmt: skip
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapter,
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return [after - before for before, after in pairwise(marks)]


if __name__ == "__main__":
    main()
