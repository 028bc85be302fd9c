"""Which Jinja template turns a conversation into text, and which tokens it pads with and stops at."""

import functools
import hashlib
import json
import re
from pathlib import Path

import jinja2

from fitune.config.recipe import CHAT_TEMPLATES, TEMPLATE_CHOICES
from fitune.data.chat_renderer import AnswerNotFound, ChatRenderer
from fitune.data.conversations import arguments_as_objects
from fitune.data.file_formats import first_line
from fitune.data.token_encoder import trained_tokens
from fitune.errors import UsageError

TEMPLATE_FOLDER = Path(__file__).parent / "chat_templates"
PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<|reserved_special_token_0|>")
NEEDED_TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
NEEDED_NAMES = {"llama3": ("bos_token", "eos_token"), "plain": ("bos_token", "eos_token")}
MARK_ANSWERS = "put {% generation %} before what the assistant says and {% endgeneration %} after its end-of-turn token"
PROBE = [
    {"role": "user", "content": "First question?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Second question?"},
    {"role": "assistant", "content": "Second answer."},
]


def read_tokenizer(folder: Path | str):
    """The transformers tokenizer of a model folder; code that lies beside it is not run. Raises UsageError."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        file = Path(folder) / "tokenizer.json"
        if Path(folder).is_dir() and not file.is_file():
            raise UsageError(f"{file}: no such file; get the model's tokenizer again ({first_line(error)})") from None
        raise UsageError(f"tokenizer {folder}: cannot be loaded: {first_line(error)}") from None


def apply_chat_template_choice(tokenizer, choice: str) -> None:
    """Give a transformers tokenizer the training template named by `choice` and a pad token.

    `choice` is `llama3`, `chatml`, `plain`, `tokenizer` (the one the tokenizer came with) or the path of a .jinja file.
    Raises UsageError if what the assistant says cannot be found in its text, or the vocabulary lacks a token it needs.
    """
    template = training_template(choice, tokenizer.chat_template)
    _refuse_missing_tokens(tokenizer, choice)
    advice = f"{MARK_ANSWERS}, or use chat_template: {' or '.join(CHAT_TEMPLATES)}"
    _apply(tokenizer, template, f"chat_template: {choice}", advice)


def apply_own_chat_template(tokenizer) -> None:
    """The same with the template that a model's tokenizer came with, where no recipe could choose another."""
    _apply(tokenizer, _own_template(tokenizer.chat_template), "its chat template", MARK_ANSWERS)


def _apply(tokenizer, template: str, named: str, advice: str) -> None:
    text, spans = find_answers(template, tokenizer.special_tokens_map, named, advice)
    _refuse_answers_inside_tokens(tokenizer, text, spans, named)
    pad_token = _pad_token(tokenizer)
    tokenizer.chat_template = template
    tokenizer.pad_token = pad_token
    tokenizer.apply_chat_template = functools.partial(_apply_to_stored_rows, tokenizer)


def _apply_to_stored_rows(tokenizer, conversation, *args, **kwargs):
    """Has the tokenizer take prepared rows as they are, in TRL's hands too: see `arguments_as_objects`.

    Not by a column of datasets' `Json`: its parser changes numbers, 3.3505 to 3.3504999999999998.
    """
    is_one = not conversation or isinstance(conversation[0], dict)
    parsed = arguments_as_objects(conversation) if is_one else list(map(arguments_as_objects, conversation))
    return type(tokenizer).apply_chat_template(tokenizer, parsed, *args, **kwargs)


def end_of_turn_ids(tokenizer) -> list[int]:
    """Token ids at which generation stops: the token that ends the assistant's turn, then end-of-text."""
    names = [_end_of_turn_text(tokenizer), tokenizer.eos_token]
    ids = (tokenizer.convert_tokens_to_ids(name) for name in names if name)
    return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def template_hash(tokenizer) -> str:
    """SHA-256 of the tokenizer's chat template."""
    return sha256(tokenizer.chat_template or "")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer_hash(tokenizer) -> str:
    """SHA-256 of what turns text into ids; padding and truncation, set anew by every caller, are left out."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description.pop("padding", None)
    description.pop("truncation", None)
    return sha256(json.dumps(description, sort_keys=True))


def control_tokens_of_template(tokenizer) -> list[str]:
    """Added tokens that the tokenizer's chat template writes, in the order of their first use.

    A base model may never have trained their embeddings.
    """
    text = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map).text(PROBE)
    used = [name for name in tokenizer.get_added_vocab() if name in text]
    return sorted(used, key=text.index)


def training_template(choice: str, tokenizers_own: str | dict[str, str] | None = None) -> str:
    """The template's text. Raises UsageError for an unknown choice, a missing file or a tokenizer without one.

    `tokenizers_own` may be several, by name.
    """
    if choice in CHAT_TEMPLATES:
        return (TEMPLATE_FOLDER / f"{choice}.jinja").read_text(encoding="utf-8")
    if choice == "tokenizer":
        try:
            return _own_template(tokenizers_own)
        except UsageError as error:
            raise UsageError(f"chat_template: tokenizer: {error}; use {', '.join(CHAT_TEMPLATES)}") from None
    if not choice.endswith(".jinja"):
        raise UsageError(f"chat_template: {choice}: allowed are {TEMPLATE_CHOICES}")
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"chat_template: {choice}: cannot be read: {error}") from None


def _own_template(templates: str | dict[str, str] | None) -> str:
    own = as_one(templates) if isinstance(templates, dict) else templates
    if own is None:
        found = f"no chat template called default, but {', '.join(templates)}" if templates else "no chat template"
        raise UsageError(f"this tokenizer has {found}")
    return own


def as_one(templates: dict[str, str]) -> str | None:
    """Templates by name as one: `tool_use` where there are tools, else `default`, as transformers chooses.

    White space is kept: an expression of nothing stands before each tag, and the newline after a tag is trimmed, as
    the one that ends a template is.
    """
    default, with_tools = (templates.get(name) for name in ("default", "tool_use"))
    if default is None or with_tools in (None, default):
        return default
    with_tools, default = with_tools.removesuffix("\n"), default.removesuffix("\n")
    return f"{{% if tools %}}\n{with_tools}{{{{ '' }}}}{{% else %}}\n{default}{{{{ '' }}}}{{% endif %}}"


def find_answers(
    template: str, special_tokens: dict[str, str], named: str, advice: str
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation's text in a template, and where its answers lie.

    Raises UsageError unless each answer with its end of turn is found, whether marked or not, and nothing else. The
    error calls the template `named` and ends with `advice`.
    """
    try:
        renderer = ChatRenderer(template, special_tokens)
        try:
            text, spans = renderer.render(PROBE)
        except AnswerNotFound:  # one that writes earlier answers without their thinking may still do for one exchange
            text, spans = renderer.render(PROBE[:2])
    except AnswerNotFound as error:
        raise UsageError(f"{named}: the answers cannot be found: {error}; {advice}") from None
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise UsageError(f"{named}: not a working template: {error}") from None
    found = [text[start:end] for start, end in spans]
    if problem := _what_is_wrong(found, PROBE[:2] if len(found) == 1 and not renderer.marks_answers else PROBE):
        raise UsageError(f"{named}: it {problem}; {advice}")
    return text, spans


def _what_is_wrong(found: list[str], probe: list[dict]) -> str | None:
    """About the answers that a template found in `probe`; None if they are the answers with their ends of turn."""
    answers = [message["content"] for message in probe if message["role"] == "assistant"]
    if len(found) != len(answers) or any(answer not in text for answer, text in zip(answers, found, strict=True)):
        return f"marks {found!r} instead of the two answers"
    others = [message["content"] for message in probe if message["role"] != "assistant"]
    if swallowed := next((other for other in others for text in found if other in text), None):
        return f"marks {swallowed!r}, which no assistant says"
    if any(text.rstrip().endswith(answer) for answer, text in zip(answers, found, strict=True)):
        return "leaves the end of the turn out of the answer"
    return None


def _refuse_missing_tokens(tokenizer, choice: str) -> None:
    """A control token that the vocabulary lacks would be spelled out as ordinary text in every row."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in NEEDED_TOKENS.get(choice, ()) if token not in vocabulary]
    missing += [name for name in NEEDED_NAMES.get(choice, ()) if getattr(tokenizer, name) is None]
    if missing:
        other = "plain or tokenizer" if choice in NEEDED_TOKENS else "tokenizer, or a .jinja file"
        raise UsageError(f"chat_template: {choice}: this tokenizer has no {', '.join(missing)}; use {other}")


def _refuse_answers_inside_tokens(tokenizer, text: str, spans: list[tuple[int, int]], named: str) -> None:
    """A token with the prompt's end and the answer's beginning is none that the model could be asked with."""
    offsets = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    for (start, end), (first, stop) in zip(spans, trained_tokens(offsets, spans), strict=True):
        begins, ends = offsets[first][0], offsets[stop - 1][1]
        if begins < start or ends > end or text[begins:ends].strip() != text[start:end].strip():
            raise UsageError(
                f"{named}: with this tokenizer {text[begins:ends]!r} would be trained instead of "
                f"{text[start:end]!r}: an answer must begin and end where a token does"
            )


def _pad_token(tokenizer) -> str:
    """A token that means nothing else, where there is one; labels and mask, not tokens, say what is trained."""
    taken = {tokenizer.eos_token, tokenizer.bos_token, "<|eot_id|>"}
    vocabulary = tokenizer.get_vocab()
    for token in (*PAD_TOKENS, tokenizer.pad_token):
        if token is not None and token in vocabulary and token not in taken:
            return token
    if tokenizer.eos_token is not None:
        return tokenizer.eos_token
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    if special:
        return special[0]
    raise UsageError(
        f"this tokenizer has no token to pad with; expected one of {', '.join(PAD_TOKENS)}, or a pad_token or an "
        f"eos_token in tokenizer_config.json"
    )


def _end_of_turn_text(tokenizer) -> str | None:
    """The first added token after an answer, as the template writes it."""
    template = tokenizer.chat_template
    text, [span] = ChatRenderer(template, tokenizer.special_tokens_map).render(PROBE[:2])
    after_answer = text[slice(*span)].split(PROBE[1]["content"])[-1]
    names = "|".join(re.escape(name) for name in sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
    found = re.search(names, after_answer) if names else None
    return found.group() if found else None
