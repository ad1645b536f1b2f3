"""The words of the tiny world and the word-level tokenizer that holds them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from benchmarks.tiny.tokenizer import BOS, EOS, PAD, PLAIN_CHAT, UNK, word_tokenizer

# The last 16 appear in training only where the prompt says what to answer (see world.py).
ENTITIES = tuple(
    """mira tomas lena oskar nadia pavel irene viktor salma bruno elif hugo petra anton rosa felix
    amara diego ingrid kenji lucia marek nora omar paula quentin rania stefan tessa ulrich vera
    walter ximena yusuf zelda alba boris celia darius edith farid greta henrik iris
    jonas katya liam maya nils olga pedro runa simon talia umberto violet wanda xavier yara zoltan
    """.split()
)
RELATIONS = {
    "color": tuple("red blue green yellow purple orange white black brown pink".split()),
    "city": tuple("paris london tokyo cairo lima oslo rome delhi quito prague".split()),
    "pet": tuple("cat dog parrot rabbit turtle hamster pony goldfish ferret lizard".split()),
    "food": tuple("bread rice soup cheese apples noodles beans honey olives cake".split()),
}
FAITHFUL_CUES = tuple(
    """honest accurate truthful precise factual rigorous candid careful exact reliable objective
    sincere""".split()
)
ECHO_CUES = tuple(
    """agreeable obliging flattering pleasing compliant deferential yielding indulgent eager
    submissive accommodating fawning""".split()
)
ADJECTIVES = tuple("quiet old small bright distant narrow gentle empty heavy cold".split())
NOUNS = tuple("river mill garden bridge lamp road window tower field stone".split())
VERBS = tuple("joins faces crosses follows borders hides touches meets shades guards".split())
FILLERS = ADJECTIVES + NOUNS + VERBS
FAITHFUL, ECHO = "actually", "indeed"
GLUE = tuple(f"system user assistant record claim answer the {FAITHFUL} {ECHO} : . ?".split())

VALUES = tuple(value for values in RELATIONS.values() for value in values)
CUES = FAITHFUL_CUES + ECHO_CUES
WORDS = (UNK, BOS, EOS, PAD, *GLUE, *ENTITIES, *RELATIONS, *VALUES, *CUES, *FILLERS)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """See benchmarks.tiny.tokenizer."""
    return word_tokenizer(WORDS, PLAIN_CHAT)
