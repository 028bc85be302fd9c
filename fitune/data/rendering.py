"""A prepared row as the model reads it, and where in that text lies what is trained."""

from fitune.data.chat_renderer import ChatRenderer, Span
from fitune.data.conversations import for_template
from fitune.data.training_flags import trained_answers


def render_row(renderer: ChatRenderer, row: dict, train_on: str) -> tuple[str, list[Span]]:
    """Of a conversation the trained answers, of a plain text all of it. Raises what `ChatRenderer.render` does."""
    if "text" in row:
        return renderer.document(row["text"])
    return renderer.render(*for_template(row), trained_answers(row["messages"], train_on))
