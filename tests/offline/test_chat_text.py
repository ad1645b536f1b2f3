"""Prompts as chat templates write them: everything is carried as transformers does, or refused.

The templates do what those of well-known families do, in fewer words.
"""

import json

import pytest

from offline.chat_text import render
from offline.errors import InputError
from offline.pairs import load_pairs
from offline.prompts import tokenise
from tests.offline.worlds import build_tokenizer, write_jsonl

# Thoughts before the last question are left out, an answer gets empty ones; tools and their calls.
QWEN3 = """
{%- if tools %}<system>{{ messages[0].content if messages[0].role == 'system' }} w50
{%- for tool in tools %}{{ ' ' ~ tool | tojson }}{% endfor %}{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought = '' %}{% set said = m.content or '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}
{%- set said = said.split('</think>')[-1].lstrip() %}{% endif %}
{{- '<assistant>' }}
{%- if loop.index0 > ns.last %}<think>{{ thought }}</think> {% endif %}{{ said }}
{%- for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<eos>
{%- elif m.role == 'tool' %}<user><result>{{ m.content }}</result><eos>
{%- elif not (tools and m.role == 'system') %}<{{ m.role }}>{{ m.content }}<eos>
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}<assistant>
{%- if enable_thinking is defined and not enable_thinking %}<think></think> {% endif %}{% endif %}
"""
# The system's text stands in the last message, if a user says it; contents are trimmed.
MISTRAL = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}[INST] {{ system ~ '\\n\\n' if loop.last and system }}
{{- m.content | trim }}[/INST]
{%- elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}
{%- elif m.role != 'system' %}{{ raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}
"""
# Tools stand in the first question; one call at a time; a call is written instead of a content.
LLAMA = """
{{- bos_token }}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{{- '<assistant>' ~ m.tool_calls[0].function | tojson }}
{%- else %}<{{ m.role }}>{% if tools and loop.first %}{{ tools | tojson }}\n{% endif %}
{{- m.content }}{% endif %}<eos>
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""
# A new answer begins with a thought; earlier ones have lost theirs.
R1 = """
{{- bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}<assistant>{{ m.content.split('</think>')[-1] }}<eos>
{%- else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<assistant><think>\n{% endif %}
"""
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "w40", "arguments": {"q": "w41 w42"}}}
TOOL = {"type": "function", "function": {"name": "w40", "parameters": {"type": "object"}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


CALLING = [user("w1"), assistant("", tool_calls=[CALL]),
           {"role": "tool", "content": "w7", "name": "w40", "tool_call_id": "c1"}]  # fmt: skip


@pytest.fixture
def tokenizer():
    return build_tokenizer()


def rendered(tokenizer, messages, given):
    """What transformers writes, as TRL asks for it."""
    last = messages[-1]["role"] == "assistant"
    given = dict(given)
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=not last, continue_final_message=last,
        **given.pop("chat_template_kwargs", {}), **given,
    )  # fmt: skip


CARRIED = {
    "calls": (QWEN3, CALLING, {}, ["w1", "w7"]),
    "calls of another family": (LLAMA, [user("w1"), assistant(None, tool_calls=[CALL]), user("w2")],
                                {}, ["w1", "w2"]),
    "tools": (QWEN3, [system("w3"), *CALLING], {"tools": [TOOL]}, ["w3", "w1", "w7"]),
    "tools in a question": (LLAMA, [user("w1")], {"tools": [TOOL]}, ["w1"]),
    "thinking switched off": (QWEN3, [user("w1")],
                              {"chat_template_kwargs": {"enable_thinking": False}}, ["w1"]),
    "thinking left on": (QWEN3, [user("w1")],
                         {"chat_template_kwargs": {"enable_thinking": True}}, ["w1"]),
    "an answer that has begun": (QWEN3, [user("w1"), assistant("w2 w3")], {}, ["w1", "w2 w3"]),
    "trimmed, and begun": (MISTRAL, [user(" w1 "), assistant("w2 ")], {}, ["w1", "w2"]),
    "thoughts of the history": (
        QWEN3, [user("w1"), assistant("<think>w8 w9</think>\n\nw2"), user("w3")], {},
        ["w1", "w2", "w3"]),
    "thoughts beside the history": (
        QWEN3, [user("w1"), assistant("w2", reasoning_content="w8"), user("w3")], {},
        ["w1", "w2", "w3"]),
    "thoughts and nothing else": (
        R1, [user("w1"), assistant("<think>w8</think>"), user("w3")], {}, ["w1", "", "w3"]),
    "thoughts that come": (
        R1, [user("w1"), assistant("<think>w8</think>w2 w3"), user("w4")], {},
        ["w1", "w2 w3", "w4"]),
    "a system behind the history": (
        MISTRAL, [system("w3 w4"), user("w1"), assistant("w2"), user("w5")], {},
        ["w1", "w2", "w3 w4", "w5"]),
    "a passage taken out": (
        PLAIN.replace("m.content or ''",
                      "m.content.split('<think>')[0] ~ m.content.split('</think>')[1]"),
        [user("w1 <think>w9</think> w2")], {}, ["w1  w2"]),
    "a content written twice": (PLAIN.replace("<eos>", "|{{ m.content }}"), [user("w1 w2")], {},
                                ["w1 w2", "w1 w2"]),
    "documents": (PLAIN + "{{ documents | tojson if documents }}", [user("w1")],
                  {"documents": [{"title": "w2", "text": "w3"}]}, ["w1"]),
    "named templates": ({"default": PLAIN, "tool_use": LLAMA}, [user("w1")], {}, ["w1"]),
    "named templates, with tools": ({"default": PLAIN, "tool_use": LLAMA}, [user("w1")],
                                    {"tools": [TOOL]}, ["w1"]),
    "a key of one's own": (PLAIN.replace("<eos>", " {{ m.mood }}"), [{**user("w1"), "mood": "w2"}],
                           {}, ["w1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CARRIED)
def test_what_transformers_writes_is_read_and_contents_are_found(tokenizer, tmp_path, name):
    tokenizer.chat_template, messages, given, contents = CARRIED[name]
    row = {"prompt": messages, "chosen": "w10", "rejected": "w11", **given}
    [pair] = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", [row]))).pairs
    chat = render(pair.prompt, tokenizer, "x", given=pair.given)
    assert chat.text == rendered(tokenizer, messages, given)
    assert [chat.text[start:end] for start, end in chat.contents] == contents
    tokens = tokenise(pair, tokenizer)
    shown = [t for t, chosen in zip(tokens.tokens, tokens.eligible, strict=True) if chosen]
    assert shown == " ".join(contents).replace("<think>", "").split()


DROPPED = {
    "calls": (PLAIN, [*CALLING[:2], user("w2")], {}, "nothing of 'tool_calls' in message 1"),
    "a call beside a content": (
        LLAMA, [user("w1"), assistant("w2", tool_calls=[CALL]), user("w3")], {},
        "content of message 1 does not appear"),
    "tools": (MISTRAL, [user("w1")], {"tools": [TOOL]}, "nothing of 'tools'"),
    "documents": (PLAIN, [user("w1")], {"documents": [{"text": "w2"}]}, "nothing of 'documents'"),
    "a variable": (PLAIN, [user("w1")], {"chat_template_kwargs": {"enable_thinking": False}},
                   "nothing of 'enable_thinking'"),
    "thoughts": (PLAIN, [user("w1"), assistant("w2", reasoning_content="w8"), user("w3")], {},
                 "nothing of 'reasoning_content' in message 1"),
    "a speaker's name": (PLAIN, [{**user("w1"), "name": "w2"}], {}, "nothing of 'name'"),
    "a system, though its words stand elsewhere": (
        PLAIN.replace("in messages", "in messages if m.role != 'system'"),
        [system("w1"), user("w1 w2")], {}, "content of message 0 does not appear"),
    "what the row decides": (PLAIN, [user("w1")],
                             {"chat_template_kwargs": {"add_generation_prompt": False}},
                             "'add_generation_prompt', which is no variable"),
    "only a call to go on from": (QWEN3, [user("w1"), assistant(None, tool_calls=[CALL])], {},
                                  "template refuses"),
    "no default": ({"tool_use": LLAMA}, [user("w1")], {}, "no chat template"),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_what_a_template_would_drop_is_refused(tokenizer, name):
    tokenizer.chat_template, messages, given, message = DROPPED[name]
    with pytest.raises(InputError, match=f"^x: .*{message}"):
        render(messages, tokenizer, "x", given=given)


TURN = "{% for m in messages %}[{{ m.role }}]:{% if m.role == 'assistant' %} {% endif %}"
TURN += "{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]:{% endif %}"
LEADS = [  # template, answer, what stands before it, of which in the prompt
    (TURN, "w1 w2", " ", ""),
    (TURN, " w1", "", ""),  # the data says it itself
    (PLAIN, "w1", "", ""),
    (TURN.replace("'assistant' %} ", "'assistant' %} <think> "), "w1", " <think> ", " <think>"),
    (QWEN3, "i", "<think></think> ", "<think></think>"),  # a word of the thoughts' markup
    (R1, "w1", "", ""),  # the prompt has begun a thought
    ("{% if messages[1] %}{{ raise_exception('no') }}{% endif %}x{{ messages[0].content }}",
     "w1", "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("template", "answer", "lead", "before"), LEADS)
def test_an_answer_stands_where_the_template_puts_it(tokenizer, template, answer, lead, before):
    tokenizer.chat_template = template
    chat = render([user("w5")], tokenizer, "x")
    assert chat.lead(answer) == lead
    assert chat.before([answer, answer + " w9"]) == (
        before, [lead.removeprefix(before) + one for one in (answer, answer + " w9")]
    )  # fmt: skip
    if lead:
        whole = [user("w5"), assistant(answer)]
        assert tokenizer.apply_chat_template(whole, tokenize=False).startswith(
            chat.text + lead + answer
        )


def test_empty_thoughts_stand_before_the_answer_and_are_not_asked(tokenizer, tmp_path):
    tokenizer.chat_template = QWEN3
    row = {"prompt": [user("w5")], "chosen": "w1 w2", "rejected": "w3"}
    [pair] = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", [row]))).pairs
    tokens = tokenise(pair, tokenizer)
    texts = tokenizer.convert_ids_to_tokens
    assert "".join(tokens.tokens).endswith("<assistant>" + "<unk>" * (tokens.lead))
    assert texts(tokens.asked_ids)[-1] == "<assistant>" and tokens.lead > 0
    assert texts(tokens.chosen_ids) == ["w1", "w2"] and texts(tokens.rejected_ids) == ["w3"]
    # An answer that thinks has its own words for it, so the prompt has none.
    row["chosen"] = "<think>w8</think> w1"
    [pair] = load_pairs(str(write_jsonl(tmp_path / "x.jsonl", [row]))).pairs
    assert tokenise(pair, tokenizer).lead == 0


def test_begun_answers_go_on_without_a_turn_between(tokenizer):
    tokenizer.chat_template = QWEN3
    chat = render([user("w1"), assistant("w2")], tokenizer, "x")
    assert chat.text.endswith("</think> w2") and chat.lead(" w3") == ""
    assert chat.answered(" w3").startswith(chat.text + " w3")


def test_templates_get_keys_and_arguments_as_the_data_has_them(tokenizer):
    """Nulls of a table stand for absent keys, those of JSON within a call for themselves."""
    import pyarrow

    rows = [
        {"prompt": [user("w1"), assistant("w2", tool_calls=[CALL]), user("w3")]},
        {"prompt": [user("w1"), assistant("w2"), user("w3")]},
    ]
    table = pyarrow.Table.from_pylist([r | {"chosen": "w4", "rejected": "w5"} for r in rows])
    assert "tool_calls" in table.to_pylist()[1]["prompt"][1]
    from offline.sources import _filled

    [one, two] = [_filled(row)["prompt"] for row in table.to_pylist()]
    assert (one, two) == (rows[0]["prompt"], rows[1]["prompt"])
    assert json.loads(json.dumps(one)) == one
