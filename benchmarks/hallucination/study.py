"""One seed: every vector at the point that validation chooses, reported once on test."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks.hallucination import rivals
from benchmarks.hallucination.judged import Figures, Sets, Sizes, make_sets, measured
from benchmarks.hallucination.rivals import GRAINS, KS, Rival
from benchmarks.hallucination.train import WEIGHTS, save, train_model
from benchmarks.hallucination.vocabulary import CAREFUL_CUES, EAGER_CUES, build_processor
from benchmarks.testbed.choice import COARSE, LIMITS, grid, neighbours, point_json
from benchmarks.testbed.shared_prefix import SharedPrefixScorer
from benchmarks.testbed.store import Result, Store
from grains_vllm.vectors import SteeringVector
from offline.model import Decoder, load_decoder
from offline.passport import Record
from offline.scoring import Point
from offline.sweep import choose

DOSES = (-0.6, -0.3, -0.15, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
METRIC = "exact"  # of Figures.measures: the share of what is not there that is not answered yes


@dataclass(frozen=True)
class Chosen:
    """What validation chose: within the limits (None if nothing is), and whatever the limits."""

    point: Point | None
    free: Point
    found: dict[Point, Figures]


@dataclass
class Study:
    """A seed's folder and what is in it; `note` is told what is being done."""

    seed: int
    folder: Path
    sizes: Sizes
    note: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.note("model")
        self.store = Store(self.folder / "results")
        self.decoder = trained(self.seed, self.folder / "model")
        self.sets: Sets = make_sets(self.decoder, self.seed, self.folder / "data", self.sizes)
        self.scorer = SharedPrefixScorer(self.decoder, {})
        self.base, *_ = measured(self.scorer, self.sets.validation, [None])

    def run(self) -> None:
        """Everything that is not there yet."""
        self.store.kept("base", self._base)
        vectors = self.folder / "vectors"
        found: dict[int, tuple[SteeringVector, list[Record]]] = {}
        for k in KS:
            self.note(f"{GRAINS}, k = {k}")
            found[k] = rivals.grains(self.decoder, self.sets.train, k, vectors)
            self.store.kept(f"k-{k}", partial(self._validated, found[k][0]))
        k = self._best_k()
        vector, records = found[k]
        self.store.kept("attribution", partial(attribution, records, k))
        self.store.kept(GRAINS, partial(self._rival, Rival(GRAINS, vector)))
        self.store.kept("doses", partial(self._doses, vector))
        for rival in rivals.rivals(self.decoder, self.sets.train, k, vector, vectors):
            self.note(rival.name)
            self.store.kept(rival.name, partial(self._rival, rival))

    def _base(self) -> Result:
        test, *_ = measured(self.scorer, self.sets.test, [None])
        return {"validation": asdict(self.base), "test": asdict(test)}

    def _validated(self, vector: SteeringVector) -> Result:
        chosen = self._choose(Rival(GRAINS, vector))
        return {"validation": None if chosen.point is None else asdict(chosen.found[chosen.point])}

    def _best_k(self) -> int:
        """The k with the least hallucination on validation, within the limits; of equals the one
        with the larger margin."""

        def rank(k: int) -> tuple[float, float]:
            found = self.store.read(f"k-{k}")["validation"]
            return (0.0, 0.0) if found is None else (1 - found["hallucination"], found["margin"])

        return max(KS, key=rank)

    def _rival(self, rival: Rival) -> Result:
        chosen = self._choose(rival)
        own, free = measured(self.scorer, self.sets.test, [chosen.point, chosen.free])
        return {
            "point": point_json(chosen.point),
            "free": point_json(chosen.free),
            "validation": None if chosen.point is None else asdict(chosen.found[chosen.point]),
            "test": asdict(own),  # without an allowed point the model is not steered
            "test_free": asdict(free),
        }

    def _choose(self, rival: Rival) -> Chosen:
        """Every layer set at a few strengths, then the neighbours of the best."""
        self.scorer.vectors = {rival.name: rival.vector}
        points = grid(rival.name, len(self.decoder.blocks), COARSE)
        found = dict(zip(points, self._measured(points), strict=True))
        best = (self._best(found, limited) for limited in (True, False))
        near = {point for one in best if one is not None for point in neighbours(one)}
        more = sorted(near - set(points), key=lambda point: (point.layers, point.strength))
        found |= dict(zip(more, self._measured(more), strict=True))
        free = self._best(found, limited=False)
        assert free is not None  # There are points.
        return Chosen(self._best(found, limited=True), free, found)

    def _measured(self, points: Sequence[Point]) -> list[Figures]:
        return measured(self.scorer, self.sets.validation, points)

    def _best(self, found: dict[Point, Figures], limited: bool) -> Point | None:
        points, measures = list(found), [figures.measures for figures in found.values()]
        allowed = [not limited or LIMITS.allow(one, self.base.measures) for one in measures]
        index = choose(points, measures, allowed, METRIC)
        return None if index is None else points[index]

    def _doses(self, vector: SteeringVector) -> Result:
        """Validation at many strengths, at the layers that validation chose."""
        own = self.store.read(GRAINS)
        layers = tuple((own["point"] or own["free"])["layers"])
        self.scorer.vectors = {GRAINS: vector}
        found = self._measured([Point(GRAINS, layers, strength) for strength in DOSES])
        return {"layers": layers, "strengths": DOSES, "figures": [asdict(one) for one in found]}


def trained(seed: int, folder: Path) -> Decoder:
    """The model of `seed`, trained if `folder` does not hold it yet."""
    torch.set_num_threads(1)
    if not (folder / WEIGHTS).is_file():
        processor = build_processor()
        folder.mkdir(parents=True, exist_ok=True)
        save(train_model(seed, processor.tokenizer), processor, folder)
    return load_decoder(str(folder), device="cpu")


def attribution(records: Sequence[Record], k: int) -> Result:
    """Where the scores are: the image's share of their absolute sum and of the selected tokens,
    how often the strongest word of a sign is a planted cue, and the completeness gap."""
    image_sum = image_selected = 0.0
    hits: dict[str, list[bool]] = {"careful_in_top3": [], "eager_in_top3": []}
    for record in records:
        flags = [token == "<image>" for token in record["tokens"]]
        sizes = [abs(score) for score in record["scores"]]
        image_sum += sum(s for s, flag in zip(sizes, flags, strict=True) if flag) / sum(sizes)
        selected = [*record["positive"], *record["negative"]]
        image_selected += sum(flags[at] for at in selected) / max(len(selected), 1)
        order = sorted(range(len(sizes)), key=lambda at: -record["scores"][at])
        words = [at for at in order if record["eligible"][at] and not flags[at]]
        for name, cues, top in (
            ("careful_in_top3", CAREFUL_CUES, words[:3]),
            ("eager_in_top3", EAGER_CUES, words[-3:]),
        ):
            hits[name].append(any(record["tokens"][at] in cues for at in top))
    gaps = [record["gap"] for record in records]
    return {
        "k": k,
        "image_share_of_scores": image_sum / len(records),
        "image_share_of_selected": image_selected / len(records),
        **{name: sum(found) / len(found) for name, found in hits.items()},
        "gap_median": median(gaps),
        "gap_max": max(gaps),
    }
