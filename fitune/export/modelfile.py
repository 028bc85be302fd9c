"""Ollama's Modelfile for a GGUF: its template in Ollama's own language, where the model's Jinja template allows it.

Ollama does not read Jinja. Most chat templates write each message between two fixed texts, those of its role. They are
found by rendering, and the result is held against the template before it is written.
"""

from dataclasses import dataclass
from pathlib import Path

import jinja2

from fitune.config.json_file import read_json
from fitune.data.chat_renderer import ChatRenderer
from fitune.export.chat_record import read_chat_record
from fitune.export.configs import GENERATION_CONFIG
from fitune.export.tokenizer_files import template_of

MODELFILE = "Modelfile"
PARAMETERS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
"Fields of generation_config.json and what Ollama calls them."
PROBE = [
    {"role": "system", "content": "Alpha"},
    {"role": "user", "content": "Beta"},
    {"role": "assistant", "content": "Gamma"},
    {"role": "user", "content": "Delta"},
    {"role": "assistant", "content": "Epsilon"},
    {"role": "user", "content": "Zeta"},
]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """A chat template that writes every message between two texts: `around[role]`, the texts before and after it."""

    around: dict[str, tuple[str, str]]
    prompt: str
    "What makes the model answer."
    default_system: str | None
    "The system message that the template writes where a conversation has none."

    def render(self, messages: list[dict]) -> str:
        written = (before + m["content"] + after for m in messages for before, after in [self.around[m["role"]]])
        return "".join(written) + self.prompt

    @property
    def can_be_written(self) -> bool:
        """Whether none of its texts would end the Modelfile's quotes, or begin an action of Go's templates."""
        texts = "".join(text for around in (*self.around.values(), (self.prompt,)) for text in around)
        return '"""' not in texts and "{{" not in texts

    def for_ollama(self) -> str:
        """In Go's template language."""
        cases = [
            f'{{{{ {"if" if n == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for n, (role, (before, after)) in enumerate(self.around.items())
        ]
        return f"{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def modelfile(model: Path, gguf: str) -> str:
    """For the file `gguf` beside it, made of the folder `model`."""
    lines, config = [f"FROM ./{gguf}"], _tokenizer_config(model)
    specials = _special_tokens(config)
    turns = find_turns(template_of(model), specials, put_before=_put_before(model, config, specials))
    if turns and turns.can_be_written:
        lines.append(f'TEMPLATE """{turns.for_ollama()}"""')
    else:
        lines.append("# The chat template cannot be written in Ollama's language; it takes what the GGUF says.")
    record = read_chat_record(model)
    system = (record and record.system_message) or (turns and turns.default_system)
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    generation = _json_or_nothing(model / GENERATION_CONFIG)
    lines += [f'PARAMETER stop "{text}"' for text in _stop_texts(model, generation)]  # as it is: no escapes there
    lines += [
        f"PARAMETER {name} {generation[key]}" for key, name in PARAMETERS.items() if generation.get(key) is not None
    ]
    return "\n".join(lines) + "\n"


def find_turns(template: str | None, special_tokens: dict[str, str], *, put_before: str = "") -> Turns | None:
    """None for a template of another kind. `put_before` is what the tokenizer puts before a text: it is left out."""
    if not template:
        return None

    def text(messages: list[dict], prompt: bool = True) -> str:
        return renderer.text(messages, add_generation_prompt=prompt).removeprefix(put_before)

    try:
        renderer = ChatRenderer(template, special_tokens)
        turns = _read_off(text)
        asked = text(PROBE[1:4])
        return (
            turns
            if turns and text(PROBE) == turns.render(PROBE) and asked == _with_default(turns, PROBE[1:4])
            else None
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):  # it refuses system messages, say
        return None


def _read_off(text) -> Turns | None:
    whole, without = text(PROBE), text(PROBE, False)
    if not whole.startswith(without):
        return None
    pieces, rest = [], without
    for message in PROBE:
        before, found, rest = rest.partition(message["content"])
        if not found:
            return None
        pieces.append(before)
    pieces.append(rest)  # pieces[n] lies before message n: the end of one message and the beginning of the next
    ends = _end_of_user(pieces, text)
    if ends is None:
        return None
    around = {"system": (pieces[0], pieces[1].removesuffix(ends["user"][0])), **ends}
    turns = Turns(around, whole.removeprefix(without), None)
    asked = text(PROBE[1:2])
    default = asked.removesuffix(turns.render(PROBE[1:2]))
    before, after = around["system"]
    if default and default.startswith(before) and default.endswith(after):
        return Turns(around, turns.prompt, default.removeprefix(before).removesuffix(after))
    return turns


def _end_of_user(pieces: list[str], text) -> dict[str, tuple[str, str]] | None:
    """The texts around user and assistant: what ends a conversation ends its last message, a user's."""
    after_user = pieces[-1]
    if not pieces[2].startswith(after_user):
        return None
    before_assistant = pieces[2].removeprefix(after_user)
    said = text(PROBE[:3], False)
    after_assistant = said.rpartition(PROBE[2]["content"])[2]
    if not pieces[3].startswith(after_assistant):
        return None
    before_user = pieces[3].removeprefix(after_assistant)
    return {"user": (before_user, after_user), "assistant": (before_assistant, after_assistant)}


def _with_default(turns: Turns, messages: list[dict]) -> str:
    system = [{"role": "system", "content": turns.default_system}] if turns.default_system else []
    return turns.render([*system, *messages])


def _put_before(model: Path, config: dict, special_tokens: dict[str, str]) -> str:
    """The token that llama.cpp puts before every text, as the tokenizer's files say."""
    bos = special_tokens.get("bos_token") or ""
    if "add_bos_token" in config:
        return bos if config["add_bos_token"] else ""
    step = _json_or_nothing(model / "tokenizer.json").get("post_processor") or {}
    for processor in step.get("processors", [step]):
        first = (processor.get("single") or [{}])[0]
        if first.get("SpecialToken", {}).get("id") == bos:
            return bos
    return ""


def _stop_texts(model: Path, generation: dict) -> list[str]:
    stop = generation.get("eos_token_id") or []
    ids = stop if isinstance(stop, list) else [stop]
    added = _json_or_nothing(model / "tokenizer.json").get("added_tokens", [])
    texts = {token["id"]: token["content"] for token in added}
    return [texts[number] for number in ids if number in texts]


def _tokenizer_config(model: Path) -> dict:
    return _json_or_nothing(model / "tokenizer_config.json")


def _special_tokens(config: dict) -> dict[str, str]:
    found = {name: config.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {name: t["content"] if isinstance(t, dict) else t for name, t in found.items() if t}


def _json_or_nothing(file: Path) -> dict:
    return read_json(file, "write it again") if file.exists() else {}
