"""The yardstick: one prompt, its unsteered reading, and how much such readings differ anyway.

A quiet server repeats a request bit by bit. One that other people use computes it in batches of
changing sizes, whose rounding may differ; how much, plain requests in a batch of their own tell.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from offline.errors import InputError
from offline.verification.probes import NONE, Probe, Reading, Target, gap

SHORTEST = 64  # tokens of a request that checks can still be made of
PROMPT_TOKENS = 288  # two blocks of prefix cache also where blocks are large (128 on CPUs)
ANSWER_TOKENS = 4
REPEATS, BATCH = 3, 6
FLOOR = 1e-6  # log-probabilities are float32; less than this is no effect
SLACK = 4.0  # a maximum over hundreds of tokens varies from run to run


@dataclass(frozen=True)
class Bench:
    """What checks share.

    Attributes:
        prompt: random text of the model, as token ids.
        plain: its unsteered reading.
        solo: by how much repeats of it differ, one at a time.
        batch: and in a batch with other, shorter ones.
    """

    target: Target
    prompt: tuple[int, ...]
    plain: Reading
    solo: float
    batch: float

    @property
    def tolerance(self) -> float:
        """Two readings that differ by more than this are different."""
        return SLACK * max(self.solo, self.batch)

    @property
    def effect(self) -> float:
        """Steering that changes less than this cannot be told from rounding."""
        return max(10 * self.tolerance, FLOOR)

    def read(
        self, fields: Mapping[str, Any] | None = None, alias: str | None = None, **more: Any
    ) -> Reading:
        """The prompt under some steering."""
        probe = Probe(self.prompt, NONE if fields is None else fields, alias, **more)
        return self.target.ask([probe])[0]

    def same(self, one: Reading, other: Reading) -> tuple[bool, str]:
        """Whether two readings are equal up to rounding, in words too."""
        found = gap(one, other)
        if found == 0:
            return True, "identical bits"
        if found <= self.tolerance:
            return True, f"within {found:.1e}; plain requests differ by {self.batch:.1e} in batches"
        return False, (
            f"differs by {found:.2e}; plain repeats differ by {self.solo:.1e}, in batches by "
            f"{self.batch:.1e}"
        )

    def differs(self, one: Reading, other: Reading) -> tuple[bool, str]:
        """Whether two readings are clearly different, in words too."""
        found = gap(one, other)
        words = f"log-probabilities differ by up to {found:.3g}"
        if found <= self.effect:
            return False, f"{words}; an effect is more than {self.effect:.1e}"
        return True, words


def prepare(target: Target) -> Bench:
    """Asks for a prompt, its unsteered reading and the noise.

    Raises:
        InputError: the target takes too short requests only.
    """
    if target.longest < SHORTEST:
        raise InputError(
            f"{target.name}: max_model_len is {target.longest}, expected {SHORTEST} or more"
        )
    length = min(PROMPT_TOKENS, target.longest - 16)
    # Many short texts at a time take less long than a single long one.
    parts = target.sample(8, -(-length // 8), secrets.randbelow(2**31))
    prompt = tuple(token for part in parts for token in part)[:length]
    probe = Probe(prompt, NONE)
    plain, *repeats = target.ask([probe] * REPEATS)
    others = [Probe(prompt[: length // part], NONE) for part in range(2, BATCH)]
    together = target.ask([probe, *others, probe], together=True)
    return Bench(
        target,
        prompt,
        plain,
        solo=max(gap(plain, repeat) for repeat in repeats),
        batch=max(gap(plain, reading) for reading in (together[0], together[-1])),
    )


def fresh_salt() -> str:
    """Nobody's prefix cache."""
    return f"verify-{secrets.token_hex(8)}"
