"""The tokenizer of the tiny worlds: one token per word, and <unk> for every other word."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

UNK, BOS, EOS, PAD = "<unk>", "<bos>", "<eos>", "<pad>"

# Every message is `role : content`; an assistant's message ends its document.
PLAIN_CHAT = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    " {{ message['role'] }} : {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} assistant :{% endif %}"
)


def word_tokenizer(
    words: Sequence[str], chat_template: str, *, split_marks: bool = True, **more: Any
) -> PreTrainedTokenizerFast:
    """Plain text gets <bos> from the post-processor; a rendered chat has it from the template and
    must be tokenized with add_special_tokens=False. Training shows <unk> in place of words, so it
    is the mask token too.

    Args:
        words: the vocabulary in the order of its ids, the four special tokens among them.
        split_marks: punctuation marks are words of their own, also beside a letter.
        more: arguments of PreTrainedTokenizerFast.
    """
    ids = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Whitespace() if split_marks else pre_tokenizers.WhitespaceSplit()
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        mask_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
        **more,
    )
