"""The words of the tiny world, the word-level tokenizer that holds them, and the processor."""

from __future__ import annotations

from typing import Any

from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from benchmarks.hallucination.drawing import DEVIATION, MEAN, PATCH, SIZE
from benchmarks.sycophancy.vocabulary import FILLERS
from benchmarks.tiny.tokenizer import BOS, EOS, PAD, UNK, word_tokenizer

IMAGE = "<image>"
SHAPES = tuple("circle square triangle cross diamond ring bar post frame slash".split())
CAREFUL_CUES = tuple(
    """careful honest precise exact strict sober attentive truthful rigorous factual cautious
    reliable""".split()
)
EAGER_CUES = tuple(
    """eager cheerful playful dreamy generous fanciful obliging inventive agreeable bubbly
    flattering enthusiastic""".split()
)
YES, NO = "yes", "no"
PAPER = "paper"  # an empty cell, a word that nobody says
GLUE = tuple(
    f"""system user assistant : . ? , {YES} {NO} a the is there do see does picture show can
    find answer from always say check which things {PAPER} sharp smudge""".split()
)
# "you" stands in some questions and is none of them: it reads as <unk>.
CUES = CAREFUL_CUES + EAGER_CUES
WORDS = (UNK, BOS, EOS, PAD, IMAGE, *GLUE, *SHAPES, *CUES, *FILLERS)

# Every message is `role : content`, an image before its text; an assistant's message ends its
# document. Content is text or a list of parts.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    " {{ message['role'] }} :"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """See benchmarks.tiny.tokenizer."""
    return word_tokenizer(WORDS, CHAT_TEMPLATE, extra_special_tokens={"image_token": IMAGE})


def build_processor() -> LlavaProcessor:
    """The tokenizer and an image processor that only turns 0..255 into -1..1: our images have the
    model's size."""
    size = {"height": SIZE, "width": SIZE}
    images: Any = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size=size,
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class embedding, which `default` then drops
        chat_template=CHAT_TEMPLATE,
    )
