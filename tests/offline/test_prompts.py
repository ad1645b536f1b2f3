"""Token ids, and which prompt tokens may be selected."""

import pytest
from tokenizers import processors

from offline.errors import InputError
from offline.pairs import Pair
from offline.prompts import takes_special, tokenise
from tests.offline.worlds import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def chosen_tokens(pair):
    return [token for token, flag in zip(pair.tokens, pair.eligible, strict=True) if flag]


def pair(prompt, chosen="w1", rejected="w2", question=None):
    return Pair("1", "x.jsonl, line 1", prompt, chosen, rejected, question)


def test_raw_text_leaves_out_bos_only(tokenizer):
    result = tokenise(pair("w3 w4 nonsense"), tokenizer)
    assert result.tokens == ["<bos>", "w3", "w4", "<unk>"]
    assert chosen_tokens(result) == ["w3", "w4", "<unk>"]


def test_question_template_is_not_eligible(tokenizer):
    result = tokenise(pair("w9: w3 w4\nw8:", " w1", question=(4, 9)), tokenizer)
    assert chosen_tokens(result) == ["w3", "w4"]
    assert result.tokens[-2:] == ["w8", ":"]


def test_chat_markup_is_not_eligible_even_when_it_repeats_content(tokenizer):
    messages = [
        {"role": "system", "content": "w3"},
        {"role": "user", "content": "  w3 w4 "},  # the template trims: spliced stripped
    ]
    result = tokenise(pair(messages), tokenizer)
    assert result.tokens[0] == "<bos>" and result.tokens.count("<bos>") == 1
    assert result.tokens[-1] == "<assistant>"
    assert chosen_tokens(result) == ["w3", "w3", "w4"]


def test_markup_written_inside_content_is_not_eligible(tokenizer):
    result = tokenise(pair([{"role": "user", "content": "w3 <eos> w4"}]), tokenizer)
    assert chosen_tokens(result) == ["w3", "w4"]


def test_content_that_looks_like_the_template_is_found_where_it_stands():
    tokenizer = build_tokenizer()
    # The template itself holds the words of the content, before and after it.
    tokenizer.chat_template = "w3 w4 : {{ messages[0].content }} : w3 w4"
    result = tokenise(pair([{"role": "user", "content": "w3 w4"}]), tokenizer)
    assert result.tokens == ["w3", "w4", ":", "w3", "w4", ":", "w3", "w4"]
    assert result.eligible == [False] * 3 + [True] * 2 + [False] * 3


def test_template_that_depends_on_content_falls_back_to_searching():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% if 'w5' in messages[0].content %}w9 {% endif %}<user> {{ messages[0].content }}"
    )
    result = tokenise(pair([{"role": "user", "content": "w5 w6"}]), tokenizer)
    assert result.tokens == ["w9", "<user>", "w5", "w6"]
    assert chosen_tokens(result) == ["w5", "w6"]


def test_content_that_the_template_changes_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "<user> {{ messages[0].content | upper }}"
    with pytest.raises(InputError, match="content of message 0 does not appear"):
        tokenise(pair([{"role": "user", "content": "w5 w6"}]), tokenizer)


def test_template_errors_are_input_errors():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"line 1: .*roles \['system'\].*no system role"):
        tokenise(pair([{"role": "system", "content": "w5"}]), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        tokenise(pair([{"role": "user", "content": "w5"}]), tokenizer)


def test_response_is_the_joint_suffix_or_tokenised_alone(tokenizer):
    joint = tokenise(pair("w3 w4", " w1 w7", " w2"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(joint.chosen_ids) == ["w1", "w7"]
    # Without a space the joint text would fuse "w4" and "w1" into one unknown word.
    alone = tokenise(pair("w3 w4", "w1 w7", "w2"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(alone.chosen_ids) == ["w1", "w7"]
    assert alone.length == 3 + 2


def test_closing_token_of_the_tokenizer_is_dropped():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    result = tokenise(pair("w3 w4", " w1"), tokenizer)
    assert result.tokens == ["<bos>", "w3", "w4"]
    assert tokenizer.convert_ids_to_tokens(result.chosen_ids) == ["w1"]


def test_nothing_eligible_and_empty_responses_are_refused(tokenizer):
    with pytest.raises(InputError, match="none of the 2 prompt tokens is eligible"):
        tokenise(pair("<eos>"), tokenizer)
    with pytest.raises(InputError, match="identical to this tokenizer"):
        tokenise(pair("w3", " unheard", " of"), tokenizer)


def test_text_that_begins_with_bos_gets_no_second_one(tokenizer):
    plain, rendered = (tokenise(pair(text), tokenizer) for text in ("w3 w4", "<bos> w3 w4"))
    assert rendered.tokens == plain.tokens == ["<bos>", "w3", "w4"]
    assert rendered.eligible == plain.eligible and rendered.chosen_ids == plain.chosen_ids
    assert takes_special(tokenizer, "w3 <bos>") and not takes_special(tokenizer, "<bos>")
    # Several tokens, as some tokenizers add them, are known as well; and none.
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> <user> $A", special_tokens=[("<bos>", 1), ("<user>", 5)]
    )
    assert tokenise(pair("<bos><user> w3"), tokenizer).tokens == ["<bos>", "<user>", "w3"]
    assert takes_special(tokenizer, "<bos> w3")
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenise(pair("<bos> w3"), tokenizer).tokens == ["<bos>", "w3"]
