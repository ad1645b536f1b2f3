"""Fine-tuning in the competition: rank, rate and epochs chosen as a vector's point is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.testbed import lora
from benchmarks.testbed.choice import LIMITS, measured, measures_json
from benchmarks.testbed.store import Result
from offline.model import Decoder
from offline.prompts import tokenise
from offline.scoring import Measures, Point
from offline.sweep import choose
from offline.transformers_scorer import TransformersScorer

if TYPE_CHECKING:
    from benchmarks.testbed.study import Study


def tuned_result(study: Study, loss: lora.Loss) -> Result:
    """A row's result, as of a vector; the merged model that was chosen is saved."""
    decoder = study.decoder
    train = [tokenise(pair, decoder.tokenizer) for pair in study.sets.train.pairs]
    base = Measures(**study.store.read("base")["validation"])
    tunings: list[lora.Tuning] = []
    found: list[Measures] = []
    for rank in lora.RANKS:
        for rate in lora.RATES:
            for tuning, model in lora.tuned(decoder, train, loss, rank, rate):
                tunings.append(tuning)
                found += measured(TransformersScorer(model, {}), study.sets.validation, [None])
    allowed = [LIMITS.allow(measures, base) for measures in found]
    kept, free = (
        _best(tunings, found, flags, study.world.metric) for flags in (allowed, [True] * len(found))
    )
    result: Result = {"tried": len(tunings), "allowed": sum(allowed), "generated": None}
    for suffix, name, index in (("", "point", kept), ("_free", "free", free)):
        if index is None:
            result |= {name: None, f"validation{suffix}": None, f"test{suffix}": None}
            continue
        model = again(decoder, study, tunings[index])
        test = measured(TransformersScorer(model, {}), study.sets.test, [None])[0]
        result |= {
            name: tunings[index].json(),
            f"validation{suffix}": measures_json(found[index]),
            f"test{suffix}": measures_json(test),
        }
        if name == "point":
            model.model.save_pretrained(study.folder / f"lora-{loss}")
            decoder.tokenizer.save_pretrained(study.folder / f"lora-{loss}")
            if study.world.judged is not None:
                result["generated"] = study.world.judged(
                    model.model, decoder.tokenizer, study.sizes.test[0], study.seed
                )
    return result


def again(decoder: Decoder, study: Study, tuning: lora.Tuning) -> Decoder:
    """The same training once more, up to `tuning.epochs`; keeping every model would take room."""
    train = [tokenise(pair, decoder.tokenizer) for pair in study.sets.train.pairs]
    *_, (_, model) = lora.tuned(
        decoder, train, tuning.loss, tuning.rank, tuning.rate, (tuning.epochs,)
    )
    return model


def _best(
    tunings: list[lora.Tuning], found: list[Measures], allowed: list[bool], metric: str
) -> int | None:
    """The rule of vectors; of equals the smaller rate, then the smaller rank."""
    points = [Point("", tuple(range(tuning.rank)), tuning.rate) for tuning in tunings]
    return choose(points, found, allowed, metric)
