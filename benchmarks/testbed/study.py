"""One seed of the testbed: every method chosen on validation and reported on test."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.testbed import methods
from benchmarks.testbed.choice import choose_point, measured, measures_json, point_json, point_of
from benchmarks.testbed.data import Sets, Sizes, make_sets
from benchmarks.testbed.figures import completeness, hit_rates
from benchmarks.testbed.lora import LOSSES
from benchmarks.testbed.methods import GRAINS, GRAINS_RESPONSE, RANDOM, Candidate, Draws
from benchmarks.testbed.shared_prefix import SharedPrefixScorer
from benchmarks.testbed.store import Result, Store
from benchmarks.testbed.tuning import tuned_result
from benchmarks.testbed.worlds import World
from grains_vllm.vectors import SteeringVector
from offline.scoring import Point
from offline.steer import steered

DOSES = (-0.6, -0.4, -0.2, -0.1, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
DOSED = (GRAINS, GRAINS_RESPONSE, "caa-last", "caa-first", "icv", "random-0")


@dataclass
class Study:
    """A seed's folder and what is in it.

    Attributes:
        note: told what is being done.
    """

    world: World
    seed: int
    folder: Path
    sizes: Sizes
    draws: Draws
    note: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.note("model")
        self.store = Store(self.folder / "results")
        self.decoder = self.world.model(self.seed, self.folder / "model")
        self.sets: Sets = make_sets(
            self.world, self.decoder, self.seed, self.folder / "data", self.sizes
        )
        self.layers = len(self.decoder.blocks)
        self._scorer = SharedPrefixScorer(self.decoder, {})

    def run(self) -> None:
        """Everything that is not there yet."""
        self.store.kept("base", self._base)
        for candidate in self.candidates():
            self.note(candidate.name)
            self.store.kept(candidate.name, partial(self._vector, candidate))
            if candidate.name in DOSED:
                self.store.kept(f"dose-{candidate.name}", partial(self._doses, candidate))
        self.store.kept("attribution", self._attribution)
        for loss in LOSSES:
            self.note(f"lora-{loss}")
            self.store.kept(f"lora-{loss}", partial(tuned_result, self, loss))

    def candidates(self) -> Iterator[Candidate]:
        """Every vector, extracted as needed."""
        return methods.candidates(
            self.decoder, self.sets.train, self.folder / "vectors", self.draws
        )

    def scorer(self, vectors: dict[str, SteeringVector]) -> SharedPrefixScorer:
        """One scorer throughout, which knows these vectors now."""
        self._scorer.vectors = vectors
        return self._scorer

    def _base(self) -> Result:
        validation, test = (
            measured(self.scorer({}), suite, [None])[0]
            for suite in (self.sets.validation, self.sets.test)
        )
        return {
            "validation": measures_json(validation),
            "test": measures_json(test),
            "generated": self._generated(None, None),
        }

    def _vector(self, candidate: Candidate) -> Result:
        """The point that validation chooses, the best without limits, and what test says there and
        at GrAInS's point."""
        name = candidate.name
        scorer = self.scorer({name: candidate.vector})
        found: Result = {
            "free": None,
            "test_free": None,
            "raw_norms": [row["raw_norm"] for row in candidate.vector.passport.get("layers", [])],
        }
        if candidate.matched:
            own = reference = self._reference(name)
        else:
            choice = choose_point(
                scorer, self.sets.validation, name, self.layers, self.world.metric,
                coarse=candidate.method in RANDOM,
            )  # fmt: skip
            own = choice.point
            reference = own if candidate.method == GRAINS else self._reference(name)
            found |= {
                "free": point_json(choice.free),
                "test_free": measures_json(measured(scorer, self.sets.test, [choice.free])[0]),
                "validation": measures_json(choice.validation[0]),
                "validation_free": measures_json(choice.validation[1]),
            }
        test, at_reference = measured(scorer, self.sets.test, [own, reference])
        return found | {
            "point": point_json(own),
            "test": measures_json(test),
            "test_reference": measures_json(at_reference),
            "generated": self._generated(candidate.vector, own),
        }

    def _reference(self, name: str) -> Point | None:
        """GrAInS's point, for another vector."""
        return point_of(self.store.read(GRAINS)["point"], name)

    def _doses(self, candidate: Candidate) -> Result:
        """The validation suite at many strengths, at the method's own chosen layers."""
        own = self.store.read(candidate.name)
        layers = (own["point"] or own["free"])["layers"]
        points = [Point(candidate.name, tuple(layers), value) for value in DOSES]
        scorer = self.scorer({candidate.name: candidate.vector})
        found = measured(scorer, self.sets.validation, points)
        return {
            "layers": layers,
            "strengths": list(DOSES),
            "measures": [measures_json(measures) for measures in found],
        }

    def _generated(self, vector: SteeringVector | None, point: Point | None) -> Result | None:
        """Figures of greedy answers to test prompts, in a world that has a judge of them."""
        if self.world.judged is None:
            return None
        arguments = (
            self.decoder.model, self.decoder.tokenizer, self.sizes.test[0], self.seed
        )  # fmt: skip
        if vector is None or point is None:
            return self.world.judged(*arguments)
        with steered(self.decoder.model, vector, point.strength, point.layers):
            return self.world.judged(*arguments)

    def _attribution(self) -> Result:
        path = self.folder / "vectors" / f"{GRAINS}.safetensors"
        _, records = methods.extracted(self.decoder, self.sets.train, methods.OPTIONS, path)
        return {**hit_rates(records, self.world.planted), **completeness(records)}
