"""How rows are converted, and what is refused: the same for every chunk of a run."""

import re
from dataclasses import dataclass, field

from fitune.data import chat_template, conversations
from fitune.data.token_encoder import TokenEncoder
from fitune.errors import UsageError


@dataclass(frozen=True)
class Rules:
    """Each worker process has a copy."""

    control_tokens: re.Pattern
    escape_control_tokens: bool = False
    template: str | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    encoder: TokenEncoder | None = None
    "None where rows are not tokenised"
    max_length: int | None = None
    long_rows: str = "refuse"
    own_lines: bool = False
    "Whether the rows were written by prepare: conversations and texts beside each other."
    train_on: str = "all"
    "Which answers: all, last or completion, as the recipe's `data.train_on`."
    reasoning: str = "refuse"
    "Thinking that the template does not write: refuse or drop, as the recipe's `data.reasoning`."


def rules_without_tokenizer(template_choice: str, *, escape_control_tokens: bool, train_on: str) -> Rules:
    if template_choice != "tokenizer":
        chat_template.training_template(template_choice)
    return Rules(conversations.LLAMA3_CONTROL_TOKENS, escape_control_tokens, train_on=train_on)


def rules_for(
    tokenizer,
    *,
    train_on: str,
    reasoning: str = "refuse",
    max_length: int | None = None,
    long_rows: str = "refuse",
    own_lines: bool = False,
    escape_control_tokens: bool = False,
) -> Rules:
    """`tokenizer`: a transformers tokenizer that holds the training template."""
    if long_rows not in ("refuse", "drop", "cut"):
        raise UsageError(f"long_rows: {long_rows}: allowed are refuse, drop, cut")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    names = set(special) | set(chat_template.control_tokens_of_template(tokenizer))
    return Rules(
        control_tokens=re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"),
        escape_control_tokens=escape_control_tokens,
        template=tokenizer.chat_template,
        special_tokens=tokenizer.special_tokens_map,
        encoder=TokenEncoder(_bare_tokenizer(tokenizer)),
        max_length=max_length,
        long_rows=long_rows,
        own_lines=own_lines,
        train_on=train_on,
        reasoning=reasoning,
    )


def _bare_tokenizer(tokenizer):
    """The `tokenizers.Tokenizer` inside, without the truncation and padding a caller may have left on."""
    bare = tokenizer.backend_tokenizer
    bare.no_truncation()
    bare.no_padding()
    return bare
