"""Chat templates: the same text and mask as transformers, one BOS, a prompt that is a prefix, a pad that is no eos."""

import json
import os
import pickle
from pathlib import Path

import jinja2
import pytest
from tiny_tokenizer import SPECIAL_TOKENS, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from fitune.data import chat_template
from fitune.data.chat_renderer import ChatRenderer
from fitune.data.chat_template import apply_chat_template_choice, end_of_turn_ids
from fitune.data.conversations import LLAMA3_CONTROL_TOKENS, RowError, check_text, for_template
from fitune.data.row_formats import to_conversation
from fitune.data.token_encoder import TokenEncoder
from fitune.errors import UsageError

CHOICES = ["llama3", "chatml", "plain"]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
END_OF_TURN = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "plain": "<|end_of_text|>"}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}],
    [
        {"role": "system", "content": "  Be brief. \n"},
        {"role": "user", "content": "\n\n 12 + 30? "},
        {"role": "assistant", "content": " 42 \n"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "(yes)\n\n- one\n- two"},
    ],
    [{"role": "user", "content": "日本語 🙂 ça"}, {"role": "assistant", "content": "🙂🙃 ﬁ — “ok”"}],
    [{"role": "user", "content": "<b>&amp;</b> {{ x }}"}, {"role": "assistant", "content": "'s\t{% if %}"}],
]
TOOL_CONVERSATION = [
    {"role": "user", "content": "Rain in Bonn?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}],
    },
    {"role": "tool", "content": '{"rain": true}'},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module", params=["tiny", "llama3"])
def new_tokenizer(request):
    """Makes fresh tokenizers: the tiny one, and the real one where FITUNE_LLAMA3_TOKENIZER names its folder."""
    if request.param == "tiny":
        return tiny_tokenizer
    folder = os.environ.get("FITUNE_LLAMA3_TOKENIZER")
    if not folder:
        pytest.skip("FITUNE_LLAMA3_TOKENIZER names no folder with the real Llama 3 tokenizer")
    import copy

    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    return lambda: copy.deepcopy(loaded)


def with_template(tokenizer, choice):
    """The tokenizer with a shipped template, and ChatML's tokens where it is that one."""
    if choice == "chatml":
        tokenizer.add_tokens([AddedToken(name, special=True) for name in CHATML_TOKENS], special_tokens=True)
    apply_chat_template_choice(tokenizer, choice)
    return tokenizer


@pytest.fixture(params=CHOICES)
def prepared(request, new_tokenizer):
    """(tokenizer with the template, renderer, choice)"""
    tokenizer = with_template(new_tokenizer(), request.param)
    return tokenizer, ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map), request.param


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_text_and_mask_equal_those_of_transformers(prepared, messages):
    tokenizer, renderer, _ = prepared
    text, spans = renderer.render(messages)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert encoded["input_ids"] == ids(tokenizer, text)
    trained = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert trained == [token for start, end in spans for token in ids(tokenizer, text[start:end])]
    answers = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    end = END_OF_TURN[prepared[2]]
    assert [text[start:stop].strip() for start, stop in spans] == [answer + end for answer in answers]


def test_tools_equal_those_of_transformers(new_tokenizer):
    tokenizer = new_tokenizer()
    apply_chat_template_choice(tokenizer, "llama3")
    renderer = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map)
    for first in ([], [{"role": "system", "content": "Be kind."}]):
        messages = first + TOOL_CONVERSATION
        text, spans = renderer.render(messages, TOOLS)
        assert text == tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
        assert text.count("<|start_header_id|>system") == 1
        assert '"name": "weather"' in text.split("<|eot_id|>")[0]
        assert '<|start_header_id|>ipython<|end_header_id|>\n\n{"rain": true}<|eot_id|>' in text
        start, end = spans[0]
        assert text[start:end] == '{"name": "weather", "parameters": {"city": "Bonn"}}<|eot_id|>'


def test_nulls_that_a_table_fills_in_change_nothing(prepared):
    _, renderer, _ = prepared
    messages = CONVERSATIONS[1]
    padded = [message | {"tool_calls": None, "name": None} for message in messages]
    assert renderer.render(padded, None) == renderer.render(messages)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompt_is_a_prefix_of_the_conversation_token_by_token(prepared, messages):
    tokenizer, renderer, _ = prepared
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = ids(tokenizer, renderer.text(messages[:number], add_generation_prompt=True))
            text, spans = renderer.render(messages[: number + 1])
            answer = ids(tokenizer, text[spans[-1][0] :])
            assert prompt + answer == ids(tokenizer, text)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_one_bos_and_one_end_of_turn_for_each_turn(prepared, messages):
    tokenizer, _, choice = prepared
    tokens = tokenizer.apply_chat_template(messages)["input_ids"]
    assert (tokens[0] == tokenizer.bos_token_id) == (choice != "chatml")
    assert tokens.count(tokenizer.bos_token_id) == (choice != "chatml")
    turns = len([message for message in messages if choice != "plain" or message["role"] != "system"])
    assert tokens.count(end_of_turn_ids(tokenizer)[0]) == turns


def test_plain_is_the_tutorials_text():
    text = ChatRenderer(chat_template.training_template("plain"), {"bos_token": "<BOS>", "eos_token": "<EOS>"}).text(
        CONVERSATIONS[1], add_generation_prompt=True
    )
    assert text == (
        "<BOS>Be brief.\n\nHuman: 12 + 30?<EOS>\n\nAssistant: 42<EOS>"
        "\n\nHuman: Sure?<EOS>\n\nAssistant: (yes)\n\n- one\n- two<EOS>\n\nAssistant:"
    )


def test_plain_refuses_tools():
    renderer = ChatRenderer(chat_template.training_template("plain"), {"bos_token": "", "eos_token": ""})
    with pytest.raises(jinja2.TemplateError, match="no words for tools"):
        renderer.render(TOOL_CONVERSATION)
    with pytest.raises(jinja2.TemplateError, match="no words for tools"):
        renderer.render(CONVERSATIONS[0], TOOLS)


def test_stop_tokens(new_tokenizer):
    names = {}
    for choice in CHOICES:
        tokenizer = with_template(new_tokenizer(), choice)
        names[choice] = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer))
    end = "<|end_of_text|>"
    assert names == {"llama3": ["<|eot_id|>", end], "chatml": ["<|im_end|>", end], "plain": [end]}


def test_stop_token_of_a_template_from_a_file(tmp_path):
    tokenizer = tiny_tokenizer()
    apply_chat_template_choice(tokenizer, jinja_file(tmp_path, good_template("<|reserved_special_token_0|>")))
    found = end_of_turn_ids(tokenizer)
    assert tokenizer.convert_ids_to_tokens(found) == ["<|reserved_special_token_0|>", "<|end_of_text|>"]


@pytest.mark.parametrize("missing", range(3))
def test_pad_is_never_a_token_with_a_meaning(missing):
    order = ["<|finetune_right_pad_id|>", "<|reserved_special_token_250|>", "<|reserved_special_token_0|>"]
    tokenizer = tiny_tokenizer([name for name in SPECIAL_TOKENS if name not in order[:missing]])
    tokenizer.pad_token = tokenizer.eos_token
    apply_chat_template_choice(tokenizer, "llama3")
    assert tokenizer.pad_token == order[missing]
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


@pytest.mark.parametrize("own", [None, "<|eot_id|>"])
def test_without_any_such_token_the_end_of_text_pads(own):
    """Not the end of a turn, even where the tokenizer pads with it."""
    tokenizer = tiny_tokenizer([name for name in SPECIAL_TOKENS if "reserved" not in name and "pad" not in name])
    tokenizer.pad_token = own
    apply_chat_template_choice(tokenizer, "llama3")
    assert tokenizer.pad_token == tokenizer.eos_token


def test_without_a_pad_token_and_an_end_of_text_any_special_token_pads(tmp_path):
    tokenizer = tiny_tokenizer([name for name in SPECIAL_TOKENS if "reserved" not in name and "pad" not in name])
    tokenizer.pad_token = tokenizer.eos_token = None
    apply_chat_template_choice(tokenizer, jinja_file(tmp_path, good_template("<|eot_id|>")))
    assert tokenizer.pad_token == "<|begin_of_text|>"


def test_no_token_to_pad_with_is_an_error_that_changes_nothing(tmp_path):
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str()) | {"added_tokens": []}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    template = good_template("END").replace("<|start_header_id|>", "").replace("<|end_header_id|>", "")
    with pytest.raises(UsageError, match="no token to pad with"):
        apply_chat_template_choice(tokenizer, jinja_file(tmp_path, template))
    assert tokenizer.chat_template is None


def test_missing_control_tokens_are_refused():
    tokenizer = tiny_tokenizer([name for name in SPECIAL_TOKENS if name != "<|eot_id|>"])
    with pytest.raises(UsageError, match=r"no <\|eot_id\|>; use plain or tokenizer"):
        apply_chat_template_choice(tokenizer, "llama3")
    apply_chat_template_choice(tokenizer, "plain")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("alpaca", "allowed are llama3, chatml, plain, tokenizer or the path of a .jinja file"),
        ("nowhere.jinja", "nowhere.jinja: cannot be read"),
        ("tokenizer", "this tokenizer has no chat template; use llama3, chatml, plain"),
    ],
)
def test_unknown_choices(choice, expected):
    with pytest.raises(UsageError, match=expected):
        apply_chat_template_choice(tiny_tokenizer(), choice)


def good_template(end="<|eot_id|>", body=None):
    answer = body or "{% generation %}{{ message['content'] }}END{% endgeneration %}"
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>' }}"
        "{% if message['role'] == 'assistant' %}" + answer + "{% else %}{{ message['content'] }}END{% endif %}"
        "{% endfor %}"
    ).replace("END", end)


def jinja_file(folder: Path, text: str) -> str:
    (folder / "mine.jinja").write_text(text, encoding="utf-8")
    return str(folder / "mine.jinja")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{{ message['content'] }}", "leaves the end of the turn out"),
        ("{{ message['content'][:3] }}END", "cannot be found: it leaves out what messages.1. says: 'First answer.'"),
        ("{% generation %}{{ message['content'] }}{% endgeneration %}END", "leaves the end of the turn out"),
        ("{% generation %}{{ message['role'] }}END{% endgeneration %}", "instead of the two answers"),
        (
            "{% generation %}{{ messages[loop.index0 - 1]['content'] }}:{{ message['content'] }}END{% endgeneration %}",
            "which no assistant says",
        ),
        ("{% generation %}{{ message['content'] }}END", "not a working template"),
        ("{{ raise_exception('no') }}", "not a working template: no"),
    ],
)
def test_templates_that_cannot_mark_answers_are_refused(tmp_path, body, expected):
    with pytest.raises(UsageError, match=expected):
        apply_chat_template_choice(tiny_tokenizer(), jinja_file(tmp_path, good_template(body=body)))


def test_the_tokenizers_own_template_is_used_where_it_marks_answers():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = good_template()
    apply_chat_template_choice(tokenizer, "tokenizer")
    assert tokenizer.chat_template == good_template()
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer))[0] == "<|eot_id|>"


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_offsets_that_leave_out_a_tokens_space_change_nothing(messages):
    encoded = []
    for trim_offsets in (False, True):
        tokenizer = with_template(tiny_tokenizer(trim_offsets=trim_offsets), "plain")
        text, spans = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map).render(messages)
        encoded += TokenEncoder(tokenizer.backend_tokenizer).encode_whole([text], [spans])
    assert encoded[0] == encoded[1]


def test_an_answer_that_begins_inside_a_token_is_refused(tmp_path):
    template = "{% for m in messages %}|{{ m.role | title }}: {{ m.content }}<|eot_id|>{% endfor %}"
    prompt = "{% if add_generation_prompt %}|Assis{% endif %}"  # the tokens are As, sistan, t
    with pytest.raises(UsageError, match="must begin and end where a token does"):
        apply_chat_template_choice(tiny_tokenizer(), jinja_file(tmp_path, template + prompt))
    apply_chat_template_choice(tiny_tokenizer(), jinja_file(tmp_path, template + prompt.replace("Assis", "Assistant")))


def test_hashes_tell_templates_and_tokenizers_apart():
    first, second = tiny_tokenizer(), tiny_tokenizer()
    before = chat_template.tokenizer_hash(first)
    apply_chat_template_choice(first, "llama3")
    apply_chat_template_choice(second, "plain")
    assert chat_template.tokenizer_hash(first) == chat_template.tokenizer_hash(second) == before
    assert chat_template.template_hash(first) != chat_template.template_hash(second)
    first(["padded", "and truncated text"], padding=True, truncation=True, max_length=2)
    assert chat_template.tokenizer_hash(first) == before
    other = tiny_tokenizer((*SPECIAL_TOKENS, "<|another|>"))
    assert chat_template.tokenizer_hash(other) != before


def test_control_tokens_of_the_template():
    tokenizer = tiny_tokenizer()
    apply_chat_template_choice(tokenizer, "llama3")
    assert chat_template.control_tokens_of_template(tokenizer) == [
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ]


OWN_TEMPLATE = """{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{% if m.role == 'assistant' %}\
{% generation %}{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}\
<|eot_id|>{% endgeneration %}{% else %}{{ m.content }}<|eot_id|>{% endif %}{% endfor %}"""


@pytest.mark.parametrize("written_as", ["text", "object"])
def test_a_template_gets_the_arguments_of_tool_calls_as_objects(written_as, tmp_path):
    """As it expects them; numbers stay as they were written, which pandas' JSON parser does not grant."""
    arguments = {"city": "Köln", "lat": 3.3505, "id": 123456789012345678901234567890, "list": [{"a": None}]}
    given = json.dumps(arguments) if written_as == "text" else arguments
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}
    row = to_conversation({"messages": [{"role": "user", "content": "?"}, call]}, "messages")
    (tmp_path / "own.jinja").write_text(OWN_TEMPLATE.replace("\\\n", ""))
    tokenizer = tiny_tokenizer()
    apply_chat_template_choice(tokenizer, str(tmp_path / "own.jinja"))

    expected = '{"city": "Köln", "lat": 3.3505, "id": 123456789012345678901234567890, "list": [{"a": null}]}<|eot_id|>'
    text, [(start, end)] = ChatRenderer(tokenizer.chat_template, tokenizer.special_tokens_map).render(
        *for_template(row)
    )
    assert text[start:end] == expected
    assert tokenizer.apply_chat_template(row["messages"], tokenize=False) == text
    assert tokenizer.apply_chat_template([row["messages"]] * 2, tokenize=False) == [text, text]
    copied = pickle.loads(pickle.dumps(tokenizer))  # as a process that is spawned gets it
    assert copied.apply_chat_template(row["messages"], tokenize=False) == text


def test_arguments_that_hide_a_control_token_behind_escapes_are_found():
    function = {"name": "f", "arguments": r'{"a": "\u003c|eot_id|\u003e"}'}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    row = to_conversation({"messages": [{"role": "user", "content": "?"}, call]}, "messages")
    with pytest.raises(RowError, match="control token"):
        check_text(row, LLAMA3_CONTROL_TOKENS)
