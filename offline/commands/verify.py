"""`grains verify`: does a server, or an engine of one's own, steer as it says?"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grains_vllm.vectors import SteeringVector, write_aside
from offline.console import Force, input_errors, require_writable, stderr
from offline.errors import InputError

if TYPE_CHECKING:
    from offline.verification.bench import Bench
    from offline.verification.outcome import Outcome
    from offline.verification.run import Findings

Checks = Iterator[tuple[str, "Iterable[Outcome]"]]


def verify(
    url: Annotated[str | None, typer.Option(help="A running server with --enable-grains.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="With --url: the served name, if several; else folder or hub id."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="With --model: the YAML that the server will get.")
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME, or NAME=FILE to compare the artifact's digest. Repeatable; default: all."
        ),
    ] = None,
    reference: Annotated[
        bool,
        typer.Option(help="With --model: also compare with transformers (float32, on the CPU)."),
    ] = True,
    engine_args: Annotated[
        str | None, typer.Option(help="With --model: a JSON object for vllm.LLM.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="GRAINS_API_KEY", help="Of --url.", show_default=False)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report there too.")
    ] = None,
    force: Force = False,
) -> None:
    """Check end to end: steering fires, plain requests are untouched, caches stay apart.

    Exit code 0: no check has failed; 1: one has; 2: there was nothing to check.
    """
    with input_errors():
        if url is None and (model is None or config is None):
            raise InputError("--url for a running server, or --model and --config for an engine")
        if url is not None and (config is not None or engine_args is not None):
            raise InputError("--config and --engine-args are for --model without --url")
        if json_file is not None:
            require_writable(json_file, force)
        asked = _asked(vector or [])
        digests = {name: SteeringVector.load(path).digest for name, path in asked.items() if path}
        started = time.monotonic()
        if url is not None:
            findings = _server(url, api_key, model, list(asked), digests)
        else:
            assert model is not None and config is not None
            more = _engine_args(engine_args)
            findings = _engine(model, config, list(asked), digests, more, reference)

        from offline.verification.report import as_json, show

        show(findings)
        if json_file is not None:
            text = json.dumps(as_json(findings, time.monotonic() - started), indent=1)
            write_aside(json_file, text.encode())
            print(f"wrote {json_file}")
    if not findings.good:
        raise typer.Exit(1)


def _server(
    url: str, api_key: str | None, model: str | None, names: list[str], digests: Mapping[str, str]
) -> "Findings":
    if find_spec("httpx") is None:
        raise InputError("httpx is not installed: pip install 'grains-vllm[offline]'")

    from offline.verification import door_checks
    from offline.verification.http_target import HttpTarget
    from offline.verification.run import verify as run

    target = HttpTarget(url, api_key, model)
    vectors = _chosen(names, list(target.vectors), f"{target.name}/v1/models")

    def more(bench: "Bench", _strengths: Mapping[str, float]) -> Checks:
        yield "default", door_checks.check_default(target, bench)
        yield "refusals", door_checks.check_refusals(target, bench, vectors[0])
        for name in vectors:
            yield "streaming", door_checks.check_stream(target, bench, name)

    with stderr.status(f"verifying {target.name}"):
        return run(target, vectors, digests, more)


def _engine(
    model: str,
    config: Path,
    names: list[str],
    digests: Mapping[str, str],
    engine_args: Mapping[str, Any],
    reference: bool,
) -> "Findings":
    if Path(model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from grains_vllm.config import read_catalogue
    from grains_vllm.errors import GrainsConfigError
    from offline.verification.engine_target import EngineTarget
    from offline.verification.outcome import UNKNOWN, Outcome
    from offline.verification.run import verify as run

    try:
        catalogue = read_catalogue({"config": str(config)})
    except GrainsConfigError as error:
        raise InputError(str(error)) from error
    vectors = _chosen(names, sorted(catalogue.vectors), str(config))

    def more(bench: "Bench", _strengths: Mapping[str, float]) -> Checks:
        if not reference:
            return
        from offline.verification.reference import Reference
        from offline.verification.reference_checks import check_reference

        try:
            by_hooks = Reference(model)
        except (OSError, ValueError) as error:
            yield "", [Outcome("transformers", "", UNKNOWN, f"cannot load the model: {error}")]
            return
        entries = {name: catalogue.vectors[name] for name in vectors}
        yield "transformers", check_reference(bench, by_hooks, entries, target.dtype)

    with stderr.status("starting vLLM"):
        target = EngineTarget(model, config, catalogue, engine_args)
    with stderr.status(f"verifying {target.name}"):
        return run(target, vectors, digests, more)


def _asked(values: list[str]) -> dict[str, Path | None]:
    asked: dict[str, Path | None] = {}
    for value in values:
        name, equals, file = value.partition("=")
        if not name or (equals and not file):
            raise InputError(f"--vector is '{value}', expected NAME or NAME=FILE")
        if name in asked:
            raise InputError(f"--vector names {name} twice")
        asked[name] = Path(file) if file else None
    return asked


def _chosen(names: list[str], known: list[str], where: str) -> list[str]:
    if not known:
        raise InputError(f"{where}: no steering vector; is this a server with --enable-grains?")
    for name in names:
        if name not in known:
            raise InputError(f"--vector is '{name}', {where} has {', '.join(known)}")
    return names or known


def _engine_args(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise InputError(f"--engine-args is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"--engine-args is '{text}', expected a JSON object")
    return found
