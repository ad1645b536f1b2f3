"""The same test once more, through `vllm serve`: every chosen vector by its alias, LoRA merged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.server import free_port, running
from benchmarks.testbed.choice import measures_json, point_of
from benchmarks.testbed.lora import LOSSES
from benchmarks.testbed.store import Result
from benchmarks.testbed.study import Study
from offline.endpoint_scorer import EndpointScorer
from offline.scoring import Measures, Point, measure

MODEL = "tiny"
# vLLM would turn float32 weights into 16 bits by itself.
FLAGS = ("--dtype", "float32", "--max-model-len", "256", "--enforce-eager")


def serve(study: Study) -> None:
    """Measures base, the first draw of every method, and both fine-tuned models, over HTTP.

    Results are kept as `served-NAME`, so that what is there needs no server any more.
    """
    points: dict[str, Point | None] = {"base": None}
    entries: dict[str, Any] = {}
    folder = study.folder / "served"
    folder.mkdir(exist_ok=True)
    for candidate in study.candidates():
        point = point_of(study.store.read(candidate.name)["point"], candidate.name)
        if candidate.draw == 0 and point is not None:
            candidate.vector.save(folder / f"{candidate.name}.safetensors")
            entries[candidate.name] = {
                "path": f"{candidate.name}.safetensors",
                "layers": list(point.layers),
                "strength": point.strength,
            }
            points[candidate.name] = point
    (folder / "steering.yaml").write_text(yaml.safe_dump({"vectors": entries}))
    missing = [name for name in points if not study.store.has(f"served-{name}")]
    if missing:
        flags = ("--enable-grains", "--grains-config", str(folder / "steering.yaml"))
        aliases = {
            (name, point.layers): f"{MODEL}:{name}" for name, point in points.items() if point
        }
        with _server(study.folder / "model", folder / "server.log", flags) as url:
            scorer = EndpointScorer(url, aliases, MODEL)
            for name in missing:
                study.note(f"served {name}")
                study.store.kept(f"served-{name}", partial(_scored, study, scorer, points[name]))
    for name in (f"lora-{loss}" for loss in LOSSES):
        if study.store.read(name)["point"] is not None and not study.store.has(f"served-{name}"):
            study.note(f"served {name}")
            with _server(study.folder / name, folder / f"{name}.log") as url:
                scorer = EndpointScorer(url, {}, MODEL)
                study.store.kept(f"served-{name}", partial(_scored, study, scorer, None))


def _scored(study: Study, scorer: EndpointScorer, point: Point | None) -> Result:
    _, scores = next(iter(scorer.score(study.sets.test.items, [point])))
    found = measures_json(measure(study.sets.test, scores))
    assert found is not None
    return {"test": found}


@contextmanager
def _server(model: Path, log: Path, flags: Sequence[str] = ()) -> Iterator[str]:
    port = free_port()
    command = ["vllm", "serve", str(model), "--served-model-name", MODEL, "--port", str(port)]
    with running([*command, "--host", "127.0.0.1", *FLAGS, *flags], port, log) as url:
        yield url


def differences(study: Study) -> dict[str, dict[str, float]]:
    """Per method and measure: |vllm serve - transformers| on the test set."""
    found = {}
    for served in study.store.names():
        name = served.removeprefix("served-")
        if name == served:
            continue
        ours, theirs = (Measures(**study.store.read(key)["test"]) for key in (name, served))
        found[name] = {
            field: abs(getattr(ours, field) - getattr(theirs, field))
            for field in Measures.__dataclass_fields__
        }
    return found
