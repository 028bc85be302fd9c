"""A Modelfile's template, rendered by Go's own template engine, writes what the model's Jinja template writes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

GO = shutil.which("go")
CONVERSATIONS = {
    "one": ["user"],
    "system": ["system", "user"],
    "three": ["user", "assistant", "user"],
    "all": ["system", "user", "assistant", "user"],
}
TEXTS = ["Be {brief}.", 'Wie heißt "du"?\nSag\'s 🦙 & <b>', "{{ .Role }} {% if %}", "Und\n\n  nun?"]


@pytest.mark.skipif(GO is None, reason="no go here: apt install golang-go")
@pytest.mark.parametrize("method", ["lora"])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_go_writes_what_jinja_writes(trained, conversation):
    messages = [{"role": role, "content": text} for role, text in zip(CONVERSATIONS[conversation], TEXTS, strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(trained.merged)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    written = (trained.gguf("bf16").parent / "Modelfile").read_text()
    system = re.search(r'^SYSTEM """(.*?)"""', written, re.S | re.M)
    if system and messages[0]["role"] != "system":  # so does Ollama
        messages.insert(0, {"role": "system", "content": system[1]})
    question = {
        "template": re.search(r'^TEMPLATE """(.*?)"""', written, re.S | re.M)[1],
        "messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
    }
    program = Path(__file__).with_name("go_template.go")
    done = subprocess.run([GO, "run", program], input=json.dumps(question), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected.removeprefix("<|begin_of_text|>")  # llama.cpp puts it before every text
