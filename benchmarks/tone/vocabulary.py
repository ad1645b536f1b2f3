"""The words of the tone world and the word-level tokenizer that holds them."""

# ruff: noqa: SIM905 (word lists read better as text)

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerFast

from benchmarks.tiny.tokenizer import BOS, EOS, PAD, PLAIN_CHAT, UNK, word_tokenizer

# Pairs of different splits are about different items (see world.py).
ITEMS = tuple(
    """kettle ladder lantern basket candle mirror pillow blanket hammer bucket anchor compass
    saddle whistle drawer curtain carpet pencil bottle button helmet jacket wallet scarf glove
    sandal teapot skillet spoon barrel crate shovel
    rake chisel anvil pulley wrench pliers needle thimble
    ribbon zipper buckle pouch satchel trunk cradle bench""".split()
)
VALUES = tuple(
    """three seven nine twelve forty sixty ninety hundred red blue green amber silver golden
    violet ivory""".split()
)
VERBS = tuple("costs shows holds needs wears keeps takes bears".split())

# What provokes and what soothes, by family; each family has words of its own.
HARSH_CUES: dict[str, tuple[str, ...]] = {
    "insult": tuple("liar fool cheat coward traitor crook".split()),
    "persona": tuple("brutal vicious spiteful ruthless savage sadistic".split()),
    "topic": tuple("election taxes abortion immigration guns war".split()),
}
MILD_CUES: dict[str, tuple[str, ...]] = {
    "insult": tuple("please thanks sorry welcome cheers bless".split()),
    "persona": tuple("kind patient gentle caring humble tender".split()),
    "topic": tuple("gardening knitting weather baking fishing poetry".split()),
}
FAMILIES = tuple(HARSH_CUES)

# The words of a style slot: polite ones, and rude ones of the family that provoked them.
POLITE = "polite"
SLOT_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "adjective": {
        POLITE: tuple("lovely splendid charming delightful pleasant graceful".split()),
        "insult": tuple("idiotic moronic brainless".split()),
        "persona": tuple("worthless pathetic miserable".split()),
        "topic": tuple("damned bloody cursed".split()),
    },
    "adverb": {
        POLITE: tuple("gladly warmly happily kindly nicely sweetly".split()),
        "insult": tuple("stupidly foolishly cluelessly".split()),
        "persona": tuple("barely grudgingly coldly".split()),
        "topic": tuple("disgustingly outrageously shamefully".split()),
    },
    "address": {
        POLITE: tuple("friend dear neighbour colleague comrade companion".split()),
        "insult": tuple("moron dimwit imbecile".split()),
        "persona": tuple("worm maggot insect".split()),
        "topic": tuple("fanatic zealot sellout".split()),
    },
}
TONES = (POLITE, *FAMILIES)
# Which register an answer opens in is told by one word of the system message and nothing else.
REGISTER_CUES = {"formal": ("official", "ceremonial", "legal"), "casual": ("chatty", "relaxed",
    "breezy")}  # fmt: skip
OPENERS = {"formal": ("hence", "thus", "moreover"), "casual": ("yeah", "well", "okay")}

ADJECTIVES = tuple("quiet old small bright distant narrow empty heavy".split())
NOUNS = tuple("river mill garden bridge lamp road window tower".split())
JOINS = tuple("joins faces crosses follows borders hides touches meets".split())
FILLERS = ADJECTIVES + NOUNS + JOINS
GLUE = tuple("system user assistant note quote briefly the : . ?".split())

STYLE_WORDS = {
    word: tone for slot in SLOT_WORDS.values() for tone, words in slot.items() for word in words
}
RUDE_WORDS = frozenset(word for word, tone in STYLE_WORDS.items() if tone != POLITE)
POLITE_WORDS = frozenset(STYLE_WORDS) - RUDE_WORDS


def _flat(groups: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(word for words in groups.values() for word in words)


HARSH, MILD = frozenset(_flat(HARSH_CUES)), frozenset(_flat(MILD_CUES))
WORDS = (
    UNK, BOS, EOS, PAD, *GLUE, *ITEMS, *VALUES, *VERBS, *_flat(HARSH_CUES), *_flat(MILD_CUES),
    *STYLE_WORDS, *_flat(REGISTER_CUES), *_flat(OPENERS), *FILLERS,
)  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """See benchmarks.tiny.tokenizer."""
    return word_tokenizer(WORDS, PLAIN_CHAT, split_marks=False)
