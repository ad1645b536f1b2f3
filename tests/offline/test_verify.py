"""What verdicts are made of: noise, effects, and opposites, with a target of known behaviour."""

import math
import random
from dataclasses import replace

import pytest

from offline.verification.batch_checks import check_batch
from offline.verification.bench import prepare
from offline.verification.cache_checks import check_cache
from offline.verification.outcome import FAILED, PASSED, UNKNOWN
from offline.verification.probes import NotAnswered, Reading
from offline.verification.run import verify
from offline.verification.steering_checks import check_vector


class Target:
    """Log-probabilities are -1 plus the steering's effect plus noise; no prefix cache."""

    name, vectors, longest, has_aliases = "target", ("v", "w"), 80, False

    def __init__(self, effect=lambda strength: strength, noise=0.0, refuses=""):
        self.effect, self.noise, self.refuses = effect, noise, refuses
        self.random = random.Random(0)

    def sample(self, count, length, seed):
        return [tuple(range(n, n + length)) for n in range(count)]

    def ask(self, probes, together=False):
        return [self.answer(probe) for probe in probes]

    def answer(self, probe):
        fields = probe.fields
        if self.refuses and self.refuses in fields:
            raise NotAnswered(f"{self.refuses}: refused", 400)
        size = len(fields["steering"]) * float(fields.get("steering_strength", 0.5))
        if fields["steering"] == "none":
            size = 0.0
        places = fields.get("steering_positions", "all")
        of_prompt = self.effect(size if places != "generation" else 0.0)
        of_answer = self.effect(size if places != "prompt" else 0.0)

        def score(position, effect):
            return -1 + effect * math.sin(position) + self.noise * self.random.uniform(-1, 1)

        length = len(probe.tokens)
        prompt = [score(n, of_prompt) for n in range(length - 1)]
        answer = [
            (0, {0: score(length + n, of_answer if n else of_prompt)}) for n in range(probe.answer)
        ]
        return Reading(tuple(prompt) if probe.scored else (), tuple(answer), None, None)


def verdicts(outcomes):
    return {outcome.check: outcome.verdict for outcome in outcomes}


def test_a_quiet_target_is_held_to_its_bits():
    bench = prepare(Target())
    assert bench.tolerance == 0
    found = verdicts(check_vector(bench, "v"))
    assert set(found.values()) == {PASSED} and len(found) == 6
    assert verdicts(check_batch(bench, [("v", 0.5)])) == {
        "a mixed batch equals its requests alone": PASSED
    }


def test_noise_is_measured_and_allowed():
    bench = prepare(Target(noise=1e-3))
    assert 1e-3 < bench.solo < 2e-3 and bench.tolerance < 1e-2
    assert set(verdicts(check_vector(bench, "v")).values()) == {PASSED}


def test_an_effect_that_drowns_in_noise_is_no_effect():
    found = verdicts(check_vector(prepare(Target(noise=1e-3, effect=lambda s: s / 1000)), "v"))
    assert found["steering fires"] == FAILED
    bench = prepare(Target(noise=1e-3, effect=lambda s: s / 1000))
    assert set(verdicts(check_batch(bench, [("v", 0.5)])).values()) == {UNKNOWN}


@pytest.mark.parametrize(
    "effect, verdict",
    [
        (lambda s: 5 * s, PASSED),
        (lambda s: s + s * s, PASSED),  # far from linear at s, linear where s is small
        (lambda s: 5 * abs(s), FAILED),
        (lambda s: 50 * s * s, FAILED),
    ],
)
def test_opposites_are_looked_for_where_steering_is_linear(effect, verdict):
    found = verdicts(check_vector(prepare(Target(effect)), "v"))
    assert found["small +s and -s are opposites"] == verdict


def test_opposites_cannot_be_told_where_small_effects_drown():
    target = Target(lambda s: s + 40 * s * s, noise=1e-3)
    found = verdicts(check_vector(prepare(target), "v"))
    assert found["small +s and -s are opposites"] == UNKNOWN


def test_what_is_not_reported_is_not_checkable():
    found = verdicts(check_cache(prepare(Target()), "v", 0.5))
    assert found["cached tokens tell steerings apart"] == UNKNOWN
    assert found["steered after plain equals steered with a cold cache"] == PASSED


class Elsewhere(Target):
    """Steering makes all other tokens likely; the first answer of a salt is the answer of all."""

    def __init__(self):
        super().__init__()
        self.first = {}

    def answer(self, probe):
        token = int(probe.fields["steering"] != "none")
        found = super().answer(probe)
        answer = tuple((token, {token: top[0]}) for _, top in found.answer)
        found = replace(found, answer=answer)
        return self.first.setdefault(probe.salt, found) if probe.salt else found


def test_an_effect_without_limits_does_not_allow_everything():
    bench = prepare(Elsewhere())
    check = "steered after plain equals steered with a cold cache"
    assert verdicts(check_cache(bench, "v", 0.5))[check] == FAILED


def test_a_refused_request_is_a_failed_check_and_others_go_on():
    found = verify(Target(refuses="steering_positions"), ["v"], {}, lambda *_: iter(()))
    assert not found.good
    failed = [outcome for outcome in found.outcomes if outcome.verdict == FAILED]
    assert all("refused" in outcome.check for outcome in failed)
    assert found.outcomes[-1].check == "plain requests at last"
