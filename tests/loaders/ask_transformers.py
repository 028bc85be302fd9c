"""What the transformers of this interpreter makes of a model's or an adapter's folder. It imports nothing of fitune.

python ask_transformers.py FOLDER < {"messages": [...], "new_tokens": N, "dtype": "float32"} > answer as JSON
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, question = sys.argv[1], json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load(folder, getattr(torch, question["dtype"]))
    prompt = tokenizer.apply_chat_template(question["messages"], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        logits = model(**inputs).logits[0].float()
        output = model.generate(**inputs, do_sample=False, max_new_tokens=question["new_tokens"])[0, ids.shape[1] :]
    answer = {
        "transformers": transformers.__version__,
        "tokenizer": type(tokenizer).__name__,
        "prompt": prompt,
        "ids": ids[0].tolist(),
        "losses": torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none").tolist(),
        "stop": model.generation_config.eos_token_id,
        "answer": output.tolist(),
        "text": tokenizer.decode(output, skip_special_tokens=True),
        "gaps": gaps(model, ids, output),
    }
    print(json.dumps(answer))


def load(folder: str, dtype: torch.dtype):
    """With attention written out: its order of sums is every version's."""
    if (Path(folder) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def gaps(model, ids: torch.Tensor, output: torch.Tensor) -> list[float]:
    """By how much the first token's logit exceeds the second's, for each token of the answer."""
    logits = model(torch.cat([ids, output[None]], dim=1)).logits[0, ids.shape[1] - 1 : -1].float()
    first, second = logits.topk(2).values.T
    return (first - second).tolist()


main()
