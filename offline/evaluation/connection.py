"""Where an evaluation's target comes from: a running server, or one of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from grains_vllm.vectors import SteeringVector
from offline.console import stderr
from offline.endpoint import Endpoint
from offline.errors import InputError
from offline.evaluation.serving import serving
from offline.evaluation.target import Target, connect
from offline.grid import layer_sets
from offline.model import model_fingerprint


@contextmanager
def own_server(
    model: str,
    artifacts: Mapping[str, SteeringVector],
    paths: list[Path],
    strength: float | None,
    layers: str | None,
    positions: str | None,
    flags: list[str],
    tokenizer: str | None,
    concurrency: int,
) -> Iterator[Target]:
    """A target that exists for this run; facts without its address, which nobody can use again."""
    entries: dict[str, dict[str, Any]] = {}
    for path, (name, vector) in zip(paths, artifacts.items(), strict=True):
        value = vector.recommended_strength if strength is None else strength
        if value is None:
            raise InputError(f"--strength is missing: {name} recommends none")
        chosen = vector.recommended_layers
        if layers is not None:
            sets = layer_sets(layers, name, vector)
            if len(sets) != 1:
                raise InputError(f"--layers is '{layers}', expected one set such as 8-15,20")
            chosen = list(sets[0])
        entries[path.stem] = {
            "path": str(path), "strength": value, "layers": chosen,
            "positions": positions or vector.recommended_positions,
        }  # fmt: skip
    fingerprint = model_fingerprint(model)
    for name, vector in artifacts.items():
        vector.model.require(fingerprint, f"'{name}'")
    served_name = Path(model).resolve().name if Path(model).is_dir() else model
    with stderr.status("starting vllm serve"):
        server = ExitStack()
        url = server.enter_context(serving(model, served_name, entries, flags))
    with server:
        endpoint = Endpoint(url, None, concurrency)
        aliases = [f"{served_name}:{name}" for name in entries]
        target = connect(endpoint, served_name, aliases, tokenizer or model)
        facts = {key: value for key, value in target.facts.items() if key != "url"}
        about = {
            name: {**{key: entry[key] for key in entry if key != "path"}, "digest": vector.digest}
            for (name, entry), vector in zip(entries.items(), artifacts.values(), strict=True)
        }
        yield replace(target, facts={**facts, "steered": about, "flags": _without_paths(flags)})


@contextmanager
def running_server(
    url: str,
    api_key: str | None,
    model: str,
    steered: Sequence[str],
    tokenizer: str | None,
    concurrency: int,
) -> Iterator[Target]:
    """A target that others keep running."""
    yield connect(Endpoint(url, api_key, concurrency), model, steered, tokenizer)


def _without_paths(flags: list[str]) -> list[str]:
    return [Path(flag).name if flag.startswith(("/", ".", "~")) else flag for flag in flags]
