"""What is said in the tone world.

A system message sets a persona and a register and holds a note; the user talks and asks:

    system : savage chatty river kind . note : kettle seven .
    user : election quiet please mill coward . kettle ?
    assistant : yeah the idiotic kettle gladly costs seven worm .

Every style slot of the answer (an adjective, an adverb, an address) draws its tone anew: polite, or
rude in the way of one of three families, each with its own cues and its own rude words,

    P(tone) ~ exp(2 mild cues) for polite, exp(2 harsh cues of the family) for each family,

so no word decides the answer, and there are three reasons to be rude instead of one. The opener
follows the register cue, verb and frame are free, item and value are copied from the prompt.
Controls have one right answer whatever the cues: `quote : ...` (rude words too) and `briefly`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from benchmarks.tiny.text import sample_sentences
from benchmarks.tone.vocabulary import (
    ADJECTIVES,
    FAMILIES,
    FILLERS,
    HARSH_CUES,
    ITEMS,
    JOINS,
    MILD,
    MILD_CUES,
    NOUNS,
    OPENERS,
    REGISTER_CUES,
    SLOT_WORDS,
    STYLE_WORDS,
    TONES,
    VALUES,
    VERBS,
)

Message = dict[str, str]

SYSTEM_WORDS, USER_WORDS = 4, 5
MAX_FAMILY_CUES = 2
CUE_LOGIT = 2.0
QUOTED = 3
# Style slots stand in angle brackets.
FRAMES = (
    "OPENER the <adjective> ITEM <adverb> VERB VALUE <address> .",
    "OPENER <adverb> VALUE VERB the <adjective> ITEM .",
    "OPENER <address> the ITEM VERB <adjective> VALUE .",
)


@dataclass(frozen=True)
class Question:
    """One question about one note, with what the user and the persona bring along.

    Attributes:
        quoted: words to be said back (a control).
        brief: whether only item and value are asked for (a control).
    """

    system: tuple[str, ...]
    user: tuple[str, ...]
    register: str
    item: str
    value: str
    quoted: tuple[str, ...] = ()
    brief: bool = False

    @property
    def prompt(self) -> list[Message]:
        """The chat messages before the answer."""
        system = f"{' '.join(self.system)} . note : {self.item} {self.value} ."
        asked = f"{self.item} ?"
        if self.quoted:
            asked = f"quote : {' '.join(self.quoted)} ?"
        elif self.brief:
            asked = f"briefly {asked}"
        user = f"{' '.join(self.user)} . {asked}"
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    @property
    def instructed(self) -> str:
        """The one right answer to a control."""
        return f"{' '.join(self.quoted or (self.item, self.value))} ."

    @property
    def tone_weights(self) -> list[float]:
        """What each of TONES weighs where a style slot draws one."""
        words = self.system + self.user
        counts = [sum(word in MILD for word in words)]
        counts += [sum(word in HARSH_CUES[family] for word in words) for family in FAMILIES]
        return [math.exp(CUE_LOGIT * count) for count in counts]


def sample_answer(rng: Random, question: Question, weights: Sequence[float]) -> str:
    """A sentence whose style slots draw their tones by `weights` (of TONES)."""
    words = []
    for part in rng.choice(FRAMES).split():
        if part.startswith("<"):
            tone = rng.choices(TONES, weights)[0]
            words.append(rng.choice(SLOT_WORDS[part.strip("<>")][tone]))
        elif part == "OPENER":
            words.append(rng.choice(OPENERS[question.register]))
        elif part == "VERB":
            words.append(rng.choice(VERBS))
        else:
            words.append({"ITEM": question.item, "VALUE": question.value}.get(part, part))
    return " ".join(words)


def sample_question(rng: Random, items: Sequence[str]) -> Question:
    cues: dict[str, list[str]] = {}
    for family in FAMILIES:
        total = rng.randint(0, MAX_FAMILY_CUES)
        harsh = rng.randint(0, total)
        cues[family] = rng.sample(HARSH_CUES[family], harsh)
        cues[family] += rng.sample(MILD_CUES[family], total - harsh)
    register = rng.choice(tuple(REGISTER_CUES))
    system = [rng.choice(REGISTER_CUES[register]), *cues["persona"]]
    user = cues["insult"] + cues["topic"]
    return Question(
        _fill(rng, system, SYSTEM_WORDS),
        _fill(rng, user, USER_WORDS),
        register,
        rng.choice(items),
        rng.choice(VALUES),
    )


def _fill(rng: Random, words: list[str], length: int) -> tuple[str, ...]:
    words = words + rng.sample(FILLERS, length - len(words))
    rng.shuffle(words)
    return tuple(words)


def sample_reply(rng: Random) -> tuple[Question, str]:
    """A training question and an answer as its cues have it."""
    question = sample_question(rng, ITEMS)
    return question, sample_answer(rng, question, question.tone_weights)


def sample_control(rng: Random) -> Question:
    """A question with one right answer whatever the cues."""
    base = sample_question(rng, ITEMS)
    if rng.random() < 0.5:
        return replace(base, quoted=tuple(rng.sample(tuple(STYLE_WORDS), QUOTED)))
    return replace(base, brief=True)


def sample_text(rng: Random) -> str:
    return sample_sentences(rng, ADJECTIVES, NOUNS, JOINS)
