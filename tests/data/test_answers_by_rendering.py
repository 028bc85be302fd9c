"""Templates that do not mark the assistant's answers: found by rendering, equal to TRL's marks where it has them."""

import re
from datetime import datetime
from importlib.resources import files

import jinja2
import pytest
from preparing import QUESTION, chat, refused, rows, run, write
from test_chat_template import CHATML_TOKENS, CONVERSATIONS, TOOL_CONVERSATION, TOOLS, with_template
from tiny_tokenizer import tiny_tokenizer

from fitune.data.chat_renderer import AnswerNotFound, ChatRenderer
from fitune.data.chat_template import end_of_turn_ids, training_template
from fitune.data.conversations import for_template
from fitune.errors import UsageError

TEMPLATES = files("trl") / "chat_templates"
NEMOTRON = ("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra")
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


ASKED_OTHERWISE = {"deepseek_r1_distill", "deepseekv3", *NEMOTRON}
"Templates whose prompt opens the thinking, and that write an answer without it."
NO_TEXT = {"idefics3", "smolvlm", "llava_next"}
"Templates that take images beside the text, which other conversations than ours are made of."
BEGINS_EARLIER = {"glm4moe"}
"TRL writes an empty thinking that the model's own template leaves out."
TEXT_TEMPLATES = sorted(
    name
    for file in TEMPLATES.iterdir()
    if (name := file.name.removesuffix("_training.jinja")) != file.name and (TEMPLATES / f"{name}.jinja").is_file()
)


@pytest.mark.parametrize("name", sorted({*TEXT_TEMPLATES} - ASKED_OTHERWISE - NO_TEXT - BEGINS_EARLIER))
def test_answers_are_those_that_trl_marks(name):
    """Whatever templates TRL has marked. What it trains beyond is in the prompt that the model is asked with.

    Where a template writes earlier answers otherwise, TRL's writes them as the last one; then that one is looked at.
    """
    compared = 0
    for messages in CONVERSATIONS:
        try:
            compare(name, messages)
            compared += 1
        except AnswerNotFound as error:
            assert "otherwise once other turns follow" in str(error)
            assert_last_answer_is_found(trl(name), messages)
        except jinja2.TemplateError as error:
            assert "not supported" in str(error), error
    assert compared >= 3


@pytest.mark.parametrize("name", sorted(ASKED_OTHERWISE))
def test_thinking_that_only_the_prompt_has_is_refused(name):
    with pytest.raises(AnswerNotFound, match=r"asks for messages\[1\] with another text"):
        trl(name).render(CONVERSATIONS[0])


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen3_instruct_2507", "lfm2", "qwen3_vl"])
def test_answers_among_tools_are_those_that_trl_marks(name):
    assert compare(name, for_template({"messages": TOOL_CONVERSATION})[0], TOOLS)


def assert_last_answer_is_found(own: ChatRenderer, messages) -> None:
    """As for `data.train_on: last`: what is before it is as the model will see it when it is asked."""
    text, [(start, end)] = own.render(messages, None, [False, True])
    assert text[:start] == own.text(messages[:-1], add_generation_prompt=True)
    assert messages[-1]["content"] in text[start:end] and end == len(text)


def compare(name: str, messages, tools=None) -> int:
    """How many answers are trained: what each says is in TRL's marks, and each begins where its prompt ends."""
    own, training = trl(name), trl(f"{name}_training")
    assert training.marks_answers and not own.marks_answers
    (text, spans), (marked_text, marks) = own.render(messages, tools), training.render(messages, tools)
    assert text == marked_text and spans
    marked = {place for start, end in marks for place in range(start, end)}
    found = {place for start, end in spans for place in range(start, end)}
    assert not [text[place] for place in found - marked if text[place].strip()]
    numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = {len(own.text(messages[:number], tools, add_generation_prompt=True)) for number in numbers}
    assert {start for start, _ in spans} == prompts
    earlier = "".join(text[place] for place in sorted(marked - found))
    # of the prompts' ends: the role, and thinking that is opened or left empty there
    assert not re.sub(r"<\|start\|>assistant|</?think>|\s", "", earlier)
    return len(spans)


def test_llama_3_2_has_todays_date():
    """What is prepared has the day of `prepare`; a model is asked with the day it is asked on."""
    text, _ = trl("llama3_2").render(CONVERSATIONS[0])
    assert f"Today Date: {datetime.now():%d %b %Y}" in text


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
    shortened = CHATML.replace("message['content']", "message['content'][:9]")
    with pytest.raises(AnswerNotFound, match=r"leaves out what messages\[1\] says: 'It rains in Paris\.'"):
        ChatRenderer(shortened, TOKENS).render([QUESTION, {"role": "assistant", "content": "It rains in Paris."}])
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


DEFAULT = """  {% for m in messages %}
<{{ m.role }}>{{ m.content }}</s>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}
"""
WITH_TOOLS = "\n{%- set n = tools | length %}tools: {{ n }}\n" + DEFAULT + "  "


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("templates", [{"default": DEFAULT, "tool_use": WITH_TOOLS, "rag": "x"}, {"default": DEFAULT}])
def test_templates_by_name_are_one_that_writes_what_transformers_does(templates, tools):
    """As Hermes' tokenizers have them."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = templates
    asked = {"tools": tools, "tokenize": False}
    expected = [
        tokenizer.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=prompt, **asked)
        for prompt in (False, True)
    ]
    tokenizer.chat_template = training_template("tokenizer", templates)
    found = [
        tokenizer.apply_chat_template(CONVERSATIONS[0], add_generation_prompt=prompt, **asked)
        for prompt in (False, True)
    ]
    assert found == expected
    renderer = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map)
    assert [renderer.text(CONVERSATIONS[0], tools, prompt) for prompt in (False, True)] == expected


def test_templates_of_which_none_is_the_default_are_named():
    with pytest.raises(
        UsageError, match="this tokenizer has no chat template called default, but rag, cot; use llama3"
    ):
        training_template("tokenizer", {"rag": DEFAULT, "cot": DEFAULT})


def test_marks_that_leave_an_answer_out_are_refused():
    """Such as one that calls a tool: it would not be trained, and nothing would say so."""
    marked = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and not m.tool_calls %}\
{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"""
    messages = for_template({"messages": TOOL_CONVERSATION})[0]
    answers = sum(message["role"] == "assistant" for message in messages)
    calls = sum("tool_calls" in message for message in messages)
    assert calls
    with pytest.raises(AnswerNotFound, match=f"it marks {answers - calls} of {answers} answers"):
        ChatRenderer(marked, TOKENS).render(messages, TOOLS)
