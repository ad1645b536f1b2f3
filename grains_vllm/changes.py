"""Changes of a running server's catalogue: checked first, then in the workers, then for requests.

A catalogue is never changed in place. Requests hold what they were admitted with: a replaced or
removed vector steers them to their end, since workers keep it as long as a request needs it.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from grains_vllm import folder, metrics
from grains_vllm.catalogue import Admin, Catalogue, VectorEntry
from grains_vllm.checks import short
from grains_vllm.config import read_catalogue, read_entry
from grains_vllm.errors import GrainsConfigError
from grains_vllm.registry import Registry
from grains_vllm.vectors import ArtifactError, SteeringVector

# Workers begin once the engine's step has ended, and may have to read every artifact.
PATIENCE_S = 60.0
_GLANCE_S = 0.5  # how often a wait looks whether the engine still lives


class Refusal(Exception):
    """A change that was not made; nothing is different from before.

    Attributes:
        status: the HTTP status.
        param: which part of the request is to blame, if any.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class Changes:
    """The changes that one front end may be asked for.

    Args:
        engine: vllm.engine.protocol.EngineClient.
        served: names of the models that are served, which no vector's alias may hide behind.
    """

    def __init__(self, registry: Registry, engine: Any, served: Collection[str]) -> None:
        self._registry, self._engine, self._served = registry, engine, served

    async def put(self, name: str, settings: Mapping[str, Any], replaces: bool) -> bool:
        """Adds a vector, or replaces one; says whether there was one of that name.

        Args:
            settings: the keys of a vector in the YAML, but with `file` instead of `path`.

        Raises:
            Refusal: see the statuses in admin.py.
        """
        existed = False

        def change(now: Catalogue) -> Catalogue:
            nonlocal existed
            admin, existed = _admin(now), name in now.vectors
            if existed and not replaces:
                raise Refusal(409, f"name: {short(name)} exists; say replace: true", "name")
            if not existed and len(now.vectors) >= admin.max_vectors:
                raise Refusal(
                    409,
                    f"name: there are {len(now.vectors)} vectors already, and admin.max_vectors "
                    f"in the YAML allows {admin.max_vectors}",
                    "name",
                )
            self._require_visible(name)
            entry = _entry(name, settings, now, admin)
            return _with_vectors(now, {**now.vectors, name: entry})

        await self._make("put", change)
        return existed

    async def remove(self, name: str) -> None:
        """Removes a vector; requests that have been admitted with it go on.

        Raises:
            Refusal: 404 for an unknown name, 409 while the default or the canary uses it.
        """

        def change(now: Catalogue) -> Catalogue:
            _admin(now)
            if name not in now.vectors:
                raise Refusal(404, f"name: there is no vector {short(name)}", "name")
            for role, steering in {
                "default": now.default,
                "canary": now.canary and now.canary.steering,
            }.items():
                if steering and any(term.entry.name == name for term in steering.terms):
                    raise Refusal(
                        409, f"name: {short(name)} is the server's {role} in the YAML", "name"
                    )
            return _with_vectors(now, {k: v for k, v in now.vectors.items() if k != name})

        await self._make("remove", change)

    async def reload(self) -> dict[str, list[str]]:
        """Makes the catalogue what the YAML says now, as a restart would.

        Returns:
            Names by what happened to them: added, replaced (anything about them is different),
            removed; settings, the other keys that have new values; and after_restart, the keys
            that the YAML gives other values which only a restart would bring into force.

        Raises:
            Refusal: 409 without a YAML, 422 for one that cannot be served.
        """
        after_restart: list[str] = []

        def change(now: Catalogue) -> Catalogue:
            source = _admin(now).source
            if not source:
                raise Refusal(409, "reload: the catalogue was not read from a file")
            try:
                new = read_catalogue({"config": source})
                _require_servable(new, now)
            except (GrainsConfigError, ArtifactError) as error:
                raise Refusal(422, str(error)) from error
            for name in new.vectors:
                self._require_visible(name)
            # Both follow from the number of vectors and their layers where the YAML is silent.
            for key, wanted, found in (
                ("slots", new.limits.slots, now.limits.slots),
                ("steered_layers", new.limits.layers, now.limits.layers),
            ):
                if wanted != found:
                    after_restart.append(key)
            # The graph was compiled for these, whatever the YAML would imply by itself.
            return replace(new, limits=now.limits)

        before, after = await self._make("reload", change)
        both = before.vectors.keys() & after.vectors.keys()
        return {
            "added": sorted(after.vectors.keys() - both),
            "replaced": sorted(n for n in both if before.vectors[n] != after.vectors[n]),
            "removed": sorted(before.vectors.keys() - both),
            "settings": [key for key in _SETTINGS if _setting(before, key) != _setting(after, key)],
            "after_restart": after_restart,
        }

    def _require_visible(self, name: str) -> None:
        if hiding := [base for base in self._served if f"{base}:{name}" in self._served]:
            raise Refusal(
                409,
                f"name: {hiding[0]}:{name} is a served model, which would hide the vector's alias",
                "name",
            )

    async def _make(
        self, kind: str, change: Callable[[Catalogue], Catalogue]
    ) -> tuple[Catalogue, Catalogue]:
        try:
            # In a task of its own: a client that goes away does not leave half a change.
            return await asyncio.shield(asyncio.create_task(self._made(kind, change)))
        except TimeoutError as error:
            metrics.reloaded("refused", change=kind, status=503, reason=str(error))
            raise Refusal(503, str(error)) from error

    async def _made(
        self, kind: str, change: Callable[[Catalogue], Catalogue]
    ) -> tuple[Catalogue, Catalogue]:
        async with self._registry.changing():
            before = self._registry.snapshot().catalogue
            try:
                after = await asyncio.to_thread(change, before)
            except Exception as error:
                refusal = error if isinstance(error, Refusal) else Refusal(503, _cause(error))
                metrics.reloaded("refused", change=kind, status=refusal.status, reason=str(refusal))
                raise refusal from error
            try:
                # Workers first: nobody may name a vector that some worker does not have.
                await self._apply(after)
                self._registry.publish(after)
            except Exception as error:  # Whatever went wrong, and wherever: all goes back.
                await self._undo(before, error)
                metrics.reloaded("rolled_back", change=kind, reason=str(error))
                if isinstance(error, Refusal):
                    raise
                raise Refusal(503, f"the change could not be carried out: {error}") from error
        metrics.reloaded("applied", change=kind, changed=_difference(before, after))
        return before, after

    async def _undo(self, before: Catalogue, error: Exception) -> None:
        try:
            await self._apply(before)
        except Exception as again:
            metrics.reloaded("failed", reason=str(error), undo=str(again))
            raise Refusal(
                503, f"neither the change nor its undoing could be carried out: {error}; {again}"
            ) from again

    async def _apply(self, catalogue: Catalogue) -> None:
        """Hands the catalogue to every worker.

        Raises:
            Refusal: what any of them has against it.
        """
        results = await ask_workers(self._engine, "grains_apply", catalogue.to_json())
        if problems := sorted({result["error"] for result in results if "error" in result}):
            raise Refusal(422, f"the workers refused the change: {'; '.join(problems)}")


async def ask_workers(engine: Any, method: str, *args: Any) -> list[dict[str, Any]]:
    """collective_rpc with the answers of every data-parallel rank.

    Raises:
        TimeoutError: there is no answer after PATIENCE_S.
        vLLM's EngineDeadError: the engine has died meanwhile; vLLM itself would wait for good.
    """
    asking = asyncio.create_task(_ask_ranks(engine, method, args))
    until = time.monotonic() + PATIENCE_S
    try:
        while not (await asyncio.wait({asking}, timeout=_GLANCE_S))[0]:
            if engine.errored:
                raise engine.dead_error
            if time.monotonic() > until:
                raise TimeoutError(f"the workers did not answer within {PATIENCE_S:g} s")
        return asking.result()
    finally:
        asking.cancel()


async def _ask_ranks(engine: Any, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
    # vLLM's own asks every rank too, but returns the first one's answers alone (vllm.v1.engine.
    # core_client.DPLBAsyncMPClient.call_utility_async), and another rank's error would be lost.
    core = engine.engine_core
    ranks = getattr(core, "core_engines", ())
    if len(ranks) < 2:
        answers: list[dict[str, Any]] = await engine.collective_rpc(method, args=args)
        return answers
    found = await asyncio.gather(
        *(
            core._call_utility_async("collective_rpc", method, None, args, None, engine=rank)
            for rank in ranks
        )
    )
    return [answer for answers in found for answer in answers]


def _cause(error: Exception) -> str:
    return f"the change could not be prepared: {type(error).__name__}: {error}"[:300]


def _admin(catalogue: Catalogue) -> Admin:
    if catalogue.admin is None:
        raise Refusal(
            403,
            "this server's catalogue is fixed: its YAML has no key 'admin' (admin: {folder: ...})",
        )
    return catalogue.admin


def _entry(
    name: str, settings: Mapping[str, Any], catalogue: Catalogue, admin: Admin
) -> VectorEntry:
    file = settings["file"]
    try:
        vector = SteeringVector.parse(folder.read(admin.folder, file, admin.max_bytes), file)
        wanted = {key: value for key, value in settings.items() if key != "file"}
        # Workers read the folder's file, which may be on a disk that all machines share; they
        # compare its digest with the one of what was checked here.
        entry, model = read_entry(
            name,
            {**wanted, "path": file},
            Path(admin.folder),
            f"vectors.{name}",
            load=lambda _: vector,
        )
        catalogue.model.require(model, file)
    except folder.NotInFolder as error:
        raise Refusal(404, str(error), "file") from error
    except (GrainsConfigError, ArtifactError) as error:
        raise Refusal(422, str(error)) from error
    if missing := sorted(set(entry.layers) - set(catalogue.limits.layers)):
        raise Refusal(
            400,
            f"layers: {missing} were not compiled in; this server steers "
            f"{list(catalogue.limits.layers)} (steered_layers in its YAML; changing it takes a "
            "restart)",
            "layers",
        )
    return entry


def _require_servable(new: Catalogue, now: Catalogue) -> None:
    now.model.require(new.model, "the YAML's vectors")
    if new.admin is None:
        raise GrainsConfigError(
            "admin: is missing, and nobody could reload again; taking it away takes a restart"
        )
    if missing := sorted(set(new.limits.layers) - set(now.limits.layers)):
        raise GrainsConfigError(
            f"layers {missing} were not compiled in; this server steers "
            f"{list(now.limits.layers)} until it is restarted (steered_layers)"
        )
    facts = (
        (
            "max_vectors_per_request",
            new.limits.max_vectors_per_request,
            now.limits.max_vectors_per_request,
        ),
        ("layer_output", new.layer_output, now.layer_output),
    )
    for key, wanted, found in facts:
        if wanted != found:
            raise GrainsConfigError(f"{key} is {found} until a restart; the YAML says {wanted}")


def _with_vectors(catalogue: Catalogue, vectors: Mapping[str, VectorEntry]) -> Catalogue:
    """The catalogue with other vectors; default and canary steer with what their names mean now."""
    resolved = [asdict(entry) for entry in vectors.values()]
    return Catalogue.from_json({**catalogue.to_json(), "resolved": resolved})


_SETTINGS = ("default", "canary", "admin")


def _setting(catalogue: Catalogue, key: str) -> Any:
    return catalogue.to_json()[key]


def _difference(before: Catalogue, after: Catalogue) -> dict[str, Any]:
    """Per vector, and per other key of the YAML, every field that is different: [old, new]."""
    difference: dict[str, Any] = {}
    for name in sorted(before.vectors.keys() | after.vectors.keys()):
        old, new = (_facts(catalogue.vectors.get(name)) for catalogue in (before, after))
        if changed := {
            field: [old.get(field), new.get(field)]
            for field in old | new
            if old.get(field) != new.get(field)
        }:
            difference[name] = changed
    for key in _SETTINGS:
        if (was := _setting(before, key)) != (now := _setting(after, key)):
            difference[f"{key}:"] = [was, now]  # a colon is in no vector's name
    return difference


def _facts(entry: VectorEntry | None) -> dict[str, Any]:
    if entry is None:
        return {}
    return {**asdict(entry), "digest": entry.digest[:12], "layers": list(entry.layers)}
