"""Templates that do not mark the assistant's answers: found by rendering, equal to TRL's marks where it has them."""

from importlib.resources import files

import pytest
from preparing import QUESTION, chat, refused, rows, run, write
from test_chat_template import CHATML_TOKENS, CONVERSATIONS, TOOL_CONVERSATION, TOOLS, with_template
from tiny_tokenizer import tiny_tokenizer

from fitune.data.chat_renderer import AnswerNotFound, ChatRenderer
from fitune.data.chat_template import end_of_turn_ids
from fitune.data.conversations import for_template

TEMPLATES = files("trl") / "chat_templates"
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
"As SmolLM2 has it."


def trl(name: str) -> ChatRenderer:
    return ChatRenderer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), TOKENS)


@pytest.mark.parametrize("messages", CONVERSATIONS[:3])
@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "lfm2", "qwen3_instruct_2507"])
def test_answers_are_those_that_trl_marks(name, messages):
    compare(name, messages)


def test_an_answer_with_its_thinking_is_the_one_that_trl_marks():
    compare("qwen3", CONVERSATIONS[0])


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_instruct_2507"])
def test_answers_among_tools_are_those_that_trl_marks(name):
    compare(name, for_template({"messages": TOOL_CONVERSATION})[0], TOOLS)


def compare(name: str, messages, tools=None) -> None:
    """Apart from the line break after a role, which TRL counts to some answers and no model has to write."""
    own, training = trl(name), trl(f"{name}_training")
    assert training.marks_answers and not own.marks_answers
    (text, spans), (expected_text, expected) = own.render(messages, tools), training.render(messages, tools)
    assert text == expected_text and spans
    assert [text[start:end].lstrip("\n") for start, end in spans] == [
        text[start:end].lstrip("\n") for start, end in expected
    ]


def test_llama_3_1_with_tools():
    """Its own template: one call a turn, the results under ipython, a date of its own."""
    messages, tools = for_template({"messages": TOOL_CONVERSATION, "tools": None})[0], TOOLS
    text, spans = trl("llama3_1").render(messages, tools)
    assert [text[start:end] for start, end in spans] == [
        '{"name": "weather", "parameters": {"city": "Bonn"}}<|eot_id|>',
        "Yes.<|eot_id|>",
    ]
    filled = [message | {"tool_calls": message.get("tool_calls"), "name": None} for message in TOOL_CONVERSATION]
    assert trl("llama3_1").render(for_template({"messages": filled})[0], tools) == (text, spans)


@pytest.mark.parametrize(
    ("name", "messages", "reason"),
    [
        (
            "qwen3",
            CONVERSATIONS[1],
            r"writes messages\[2\] otherwise once other turns follow: at character \d+ '<think>",
        ),
        ("deepseek_r1_distill", CONVERSATIONS[0], r"asks for messages\[1\] with another text .* '<think>"),
        (
            "deepseek_r1_distill",
            [QUESTION, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}],
            r"asks for messages\[1\] with another text",
        ),
    ],
)
def test_templates_that_write_answers_otherwise_are_refused_with_the_place(name, messages, reason):
    with pytest.raises(AnswerNotFound, match=reason):
        trl(name).render(messages)


def test_an_earlier_answer_that_is_not_trained_may_be_written_otherwise():
    """As of a template that leaves out earlier thinking: the last answer is asked for as it is trained."""
    messages = CONVERSATIONS[1]
    text, [span] = trl("qwen3").render(messages, wanted=[False, True])
    assert text[slice(*span)] == f"<think>\n\n</think>\n\n{messages[-1]['content']}<|im_end|>\n"


def test_an_answer_that_is_cut_is_refused():
    template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    with pytest.raises(AnswerNotFound, match=r"leaves out what messages\[1\] says: 'Hm.'"):
        ChatRenderer(template, TOKENS).render([QUESTION, {"role": "assistant", "content": "<think>Hm.</think>Yes."}])


@pytest.fixture
def instruct_tokenizer():
    """As of a small instruct model: ChatML of its own without marks, padding with the token that ends a turn."""
    tokenizer = tiny_tokenizer(CHATML_TOKENS)
    tokenizer.chat_template = CHATML
    tokenizer.bos_token, tokenizer.eos_token = CHATML_TOKENS
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_the_tokenizers_own_template_without_marks_prepares_rows(tmp_path, instruct_tokenizer):
    source = write(tmp_path / "rows.jsonl", *(chat(number, "Yes, of course.") for number in range(4)))
    report = run(source, tmp_path, {"test_fraction": 0.25}, tokenizer=instruct_tokenizer, template_choice="tokenizer")
    assert report["rows_kept"] == 4 and report["dropped"] == {}
    answer = instruct_tokenizer.backend_tokenizer.encode("Yes, of course.<|im_end|>\n").ids
    assert report["tokens"]["trained"] == len(rows(tmp_path)) * len(answer)
    with_template(instruct_tokenizer, "tokenizer")
    assert instruct_tokenizer.pad_token == "<|im_end|>"
    assert end_of_turn_ids(instruct_tokenizer) == [instruct_tokenizer.eos_token_id]


def test_rows_whose_answers_a_template_hides_are_named(tmp_path, instruct_tokenizer):
    instruct_tokenizer.chat_template = CHATML.replace(
        "message['content']", "(message['content'] if loop.last or message.role == 'user' else '...')"
    )
    two = chat(1)["messages"] + chat(2)["messages"]
    source = write(tmp_path / "rows.jsonl", chat(1), {"messages": two})
    said = refused(source, tmp_path, tokenizer=instruct_tokenizer, template_choice="tokenizer")
    assert "rows.jsonl:2: the chat template hides what is to be trained: it writes messages[1] otherwise" in said
    assert "answer_not_found" in said
