"""Ollama's Modelfile: its template writes what the Jinja template writes, or is left out."""

import json
import re
from pathlib import Path

import pytest

from fitune.data.chat_renderer import ChatRenderer
from fitune.data.chat_template import TEMPLATE_FOLDER
from fitune.export.modelfile import find_turns, modelfile

SPECIALS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
WITH_DEFAULT = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>system
Be kind.</s>
{% endif %}<s>{{ m.role }}
{{ m.content }}</s>
{% endfor %}{% if add_generation_prompt %}<s>assistant
{% endif %}"""
CONVERSATIONS = [
    [{"role": "user", "content": "Hi {you}"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    ],
]


def as_ollama_writes_it(template: str, messages: list[dict]) -> str:
    """Go's template language, as far as the Modelfile uses it."""
    loop, prompt = re.fullmatch(
        r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.S
    ).groups()
    cases = re.split(r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}', loop)[1:]
    of_role = dict(zip(cases[::2], cases[1::2], strict=True))
    return "".join(of_role[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + prompt


@pytest.mark.parametrize("name", ["llama3", "chatml", "plain"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "system", "three"])
def test_ollamas_template_writes_what_jinja_writes(name, messages):
    template = (TEMPLATE_FOLDER / f"{name}.jinja").read_text()
    bos = SPECIALS["bos_token"]
    turns = find_turns(template, SPECIALS, put_before=bos)
    expected = ChatRenderer(template, SPECIALS).text(messages, add_generation_prompt=True)
    assert as_ollama_writes_it(turns.for_ollama(), messages) == expected.removeprefix(bos)


def test_a_default_system_message_becomes_ollamas():
    turns = find_turns(WITH_DEFAULT, {})
    assert turns.default_system == "Be kind."
    assert turns.around["system"] == ("<s>system\n", "</s>\n")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages | length }}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}",
        "{% for m in messages %}<{{ loop.index }}{{ m.role }}>{{ m.content }}</>{% endfor %}",
    ],
    ids=["none", "no content", "refuses", "counts"],
)
def test_other_templates_are_left_to_the_gguf(template):
    assert find_turns(template, SPECIALS) is None


def model_folder(folder: Path, end: str = "<|eot_id|>", **tokenizer_config) -> Path:
    token = SPECIALS["bos_token"]
    tokenizer = {
        "added_tokens": [{"id": 7, "content": token}, {"id": 8, "content": end}],
        "post_processor": {"type": "Sequence", "processors": [{}, {"single": [{"SpecialToken": {"id": token}}]}]},
    }
    files = {
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": SPECIALS | tokenizer_config,
        "generation_config.json": {"eos_token_id": [8, 7], "temperature": 0.6, "repetition_penalty": 1.1},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text((TEMPLATE_FOLDER / "llama3.jinja").read_text())
    return folder


def test_the_whole_file(tmp_path):
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    cases = "".join(
        f'{{{{ {word} eq .Role "{role}" }}}}{header.format(role)}{{{{ .Content }}}}<|eot_id|>'
        for word, role in (("if", "system"), ("else if", "user"), ("else if", "assistant"))
    )
    assert modelfile(model_folder(tmp_path), "mine-bf16.gguf") == (
        "FROM ./mine-bf16.gguf\n"
        f'TEMPLATE """{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{header.format("assistant")}"""\n'
        f'PARAMETER stop "<|eot_id|>"\nPARAMETER stop "{SPECIALS["bos_token"]}"\n'
        "PARAMETER temperature 0.6\nPARAMETER repeat_penalty 1.1\n"
    )


@pytest.mark.parametrize("adds", [True, False])
def test_the_first_token_is_left_to_llama_cpp_where_it_adds_it(tmp_path, adds):
    """Else the template writes it before the first message, whichever that is, which Ollama's language cannot say."""
    folder = model_folder(tmp_path, **({} if adds else {"add_bos_token": False}))
    template = "{{ bos_token }}" + WITH_DEFAULT.replace("loop.first and m.role != 'system'", "false")
    (folder / "chat_template.jinja").write_text(template)
    written = modelfile(folder, "x.gguf")
    assert ("TEMPLATE" in written) == adds
    assert SPECIALS["bos_token"] not in written.partition("PARAMETER")[0]


INSTRUCTION = re.compile(
    r'(?m)^(?:#.*|(FROM|TEMPLATE|SYSTEM|PARAMETER) (?:(?<=PARAMETER )(\w+) )?("""(?:.|\n)*?"""|.*))$'
)
"A line of a Modelfile, or several between three quotes."


def read_as_ollama_does(text: str) -> list[tuple[str, str]]:
    """Instruction or parameter -> value. What stands between quotes is taken as it is: there are no escapes."""
    found, rest = [], text
    while rest:
        match = INSTRUCTION.match(rest)
        assert match and match.end() > 0, rest[:80]
        name, parameter, value = match.groups()
        if name:
            quotes = next((q for q in ('"""', '"') if value.startswith(q)), "")
            assert not quotes or (value.endswith(quotes) and len(value) >= 2 * len(quotes)), value
            found.append((parameter or name, value[len(quotes) : len(value) - len(quotes)]))
        rest = rest[match.end() :].removeprefix("\n")
    return found


@pytest.mark.parametrize("end", ["<|eot_id|>", "<｜end▁of▁sentence｜>", "<\\end>", 'say "over"'])
def test_ollama_reads_what_was_meant(tmp_path, end):
    """Its documented format, and what its parser makes of quotes."""
    folder = model_folder(tmp_path, end)
    (folder / "chat_template.jinja").write_text(WITH_DEFAULT.replace("Be kind.", "Be kind.\nSay 'yes'."))
    found = read_as_ollama_does(modelfile(folder, "my model-bf16.gguf"))
    assert found[0] == ("FROM", "./my model-bf16.gguf") and found[1][0] == "TEMPLATE"
    written = as_ollama_writes_it(found[1][1], [{"role": "user", "content": "Hi"}])
    assert written == "<s>user\nHi</s>\n<s>assistant\n"
    assert found[2:] == [
        ("SYSTEM", "Be kind.\nSay 'yes'."), ("stop", end), ("stop", SPECIALS["bos_token"]), ("temperature", "0.6"),
        ("repeat_penalty", "1.1"),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ['"""', "{{ x"])
def test_a_text_that_ollama_would_take_for_its_own_language_is_left_to_the_gguf(tmp_path, text):
    folder = model_folder(tmp_path)
    written = WITH_DEFAULT.replace("</s>", f"</s>{{{{ {text!r} }}}}")
    (folder / "chat_template.jinja").write_text(written)
    assert find_turns(written, SPECIALS), "it is a template that Turns can say"
    assert "TEMPLATE" not in modelfile(folder, "x.gguf")
