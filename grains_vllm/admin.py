"""HTTP routes under /v1/grains/: the entry point `grains` of the group `vllm.endpoint_plugins`.

vLLM attaches them only where VLLM_PLUGINS names `grains`, and guards everything under /v1 with
--api-key. What changes something also asks for GRAINS_ADMIN_KEY, if the operator has set it.
"""

import hmac
import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from grains_vllm.capabilities import Capabilities, capabilities
from grains_vllm.catalogue import Catalogue, VectorEntry
from grains_vllm.changes import Changes, Refusal
from grains_vllm.checks import MAX_STRENGTH, short
from grains_vllm.errors import GrainsConfigError
from grains_vllm.folder import NAME
from grains_vllm.log_lines import logger
from grains_vllm.positions import ALLOWED
from grains_vllm.registry import Registry

ADMIN_KEY = "GRAINS_ADMIN_KEY"
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    422: "UnprocessableEntityError",
    503: "ServiceUnavailableError",
}


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(BaseModel):
    """An error in the shape that OpenAI clients know."""

    error: ErrorInfo


class Unreadable(BaseModel):
    """What FastAPI says of a body that it cannot decode."""

    detail: str


class Vector(BaseModel):
    """A vector that requests may name."""

    object: Literal["grains.vector"] = "grains.vector"
    name: str
    digest: str = Field(description="sha256 of the artifact's deciding bytes")
    strength: float
    layers: list[int]
    positions: str
    scale: str
    description: str
    origin: str = Field(description="the model that the artifact says it was made from")

    @classmethod
    def of(cls, entry: VectorEntry) -> "Vector":
        return cls(
            **{name: getattr(entry, name) for name in cls.model_fields if name not in _DERIVED},
            layers=list(entry.layers),
        )


_DERIVED = ("object", "layers")


class Vectors(BaseModel):
    object: Literal["list"] = "list"
    data: list[Vector]


class Deleted(BaseModel):
    object: Literal["grains.vector"] = "grains.vector"
    name: str
    deleted: bool = True


class Reloaded(BaseModel):
    """What happened to which names.

    `settings` names other keys of the YAML with new values, `after_restart` those whose new values
    only a restart brings into force.
    """

    added: list[str]
    replaced: list[str]
    removed: list[str]
    settings: list[str]
    after_restart: list[str]


class Switched(BaseModel):
    enabled: bool


_PROMPT, _GENERATION = (rf"{part}(:[1-9][0-9]{{0,8}})?" for part in ("prompt", "generation"))
_POSITIONS = rf"^(all|text|image|{_PROMPT}(\+{_GENERATION})?|{_GENERATION}(\+{_PROMPT})?)$"


# To JSON, 2.0 is a whole number too.
_Layer = Annotated[
    int,
    Field(ge=0, le=100_000),
    BeforeValidator(lambda n: int(n) if type(n) is float and n.is_integer() else n),
]


class NewVector(BaseModel):
    """A vector to add; what is left out is what the artifact recommends, as in the YAML."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # Letters and digits of all languages, and ASCII without space, ',', '/', ':' and '='.
    name: str = Field(pattern=r"^[\w!-+\-.;<>-~]{1,128}$")
    file: str = Field(pattern=NAME, description="bare name of a file in admin.folder")
    strength: float | None = Field(None, ge=-MAX_STRENGTH, le=MAX_STRENGTH, allow_inf_nan=False)
    layers: list[_Layer] | None = Field(None, min_length=1, max_length=10_000)
    positions: str | None = Field(None, pattern=_POSITIONS, description=ALLOWED)
    scale: Literal["relative", "absolute"] | None = None
    description: str | None = Field(None, max_length=4096)
    replace: bool = False


@dataclass(frozen=True)
class Console:
    """What the routes work with; one per API server process."""

    registry: Registry
    changes: Changes
    engine: Any
    key: str | None

    @property
    def catalogue(self) -> Catalogue:
        return self.registry.snapshot().catalogue


class GrainsEndpoints:
    """vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "grains"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(router)
        app.add_exception_handler(Refusal, _refused)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        state.grains = None
        processor = getattr(engine_client, "input_processor", None)
        registry = getattr(processor, "grains_registry", None)
        if registry is None:
            return
        key = os.environ.get(ADMIN_KEY)
        if key is not None and not key.strip():
            raise GrainsConfigError(f"{ADMIN_KEY} is set but empty; set a key, or unset it")
        admin = registry.snapshot().catalogue.admin
        if not key:
            tenants = args.api_key or os.environ.get("VLLM_API_KEY")
            logger().warning(
                "grains: whoever %s can switch steering off%s; set %s",
                "has the --api-key" if tenants else "reaches this server",
                "" if admin is None else " and change its vectors",
                ADMIN_KEY,
            )
        served = {model.name for model in state.openai_serving_models.base_model_paths}
        state.grains = Console(
            registry, Changes(registry, engine_client, served), engine_client, key
        )


async def _refused(_: Request, refusal: Exception) -> JSONResponse:
    assert isinstance(refusal, Refusal)
    error = ErrorInfo(
        message=str(refusal),
        type=_TYPES[refusal.status],
        param=refusal.param,
        code=refusal.status,
    )
    return JSONResponse(ErrorBody(error=error).model_dump(), status_code=refusal.status)


def _console(request: Request) -> Console:
    console: Console | None = getattr(request.app.state, "grains", None)
    if console is None:
        raise Refusal(404, "this server runs without --enable-grains")
    return console


def _operator(
    console: Annotated[Console, Depends(_console)],
    x_grains_admin_key: Annotated[str | None, Header()] = None,
) -> Console:
    if console.key is not None:
        given = (x_grains_admin_key or "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, os.fsencode(console.key)):
            raise Refusal(401, f"the header X-Grains-Admin-Key must be the server's {ADMIN_KEY}")
    return console


def _documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    # 401 may also be vLLM's own, for --api-key, which has another shape.
    documented: dict[int | str, dict[str, Any]] = {401: {"description": "a key is missing"}}
    for status in sorted({404, *statuses}):
        # FastAPI's own shape is for a body that is not even text.
        model = ErrorBody | Unreadable if status == 400 else ErrorBody
        documented[status] = {"model": model, "description": _TYPES[status]}
    return documented


Reader = Annotated[Console, Depends(_console)]
Operator = Annotated[Console, Depends(_operator)]
router = APIRouter(prefix="/v1/grains", tags=["grains"])


@router.get("/capabilities", responses=_documented())
async def get_capabilities(console: Reader) -> Capabilities:
    """Versions, layers, limits, the runner, and what requests may use."""
    return capabilities(console.engine.vllm_config, console.registry.snapshot())


@router.get("/vectors", responses=_documented())
async def list_vectors(console: Reader) -> Vectors:
    """Every vector that requests may name now."""
    vectors = console.catalogue.vectors
    return Vectors(data=[Vector.of(vectors[name]) for name in sorted(vectors)])


@router.get("/vectors/{name}", responses=_documented())
async def get_vector(name: str, console: Reader) -> Vector:
    """One vector."""
    entry = console.catalogue.vectors.get(name)
    if entry is None:
        raise Refusal(404, f"name: there is no vector {short(name)}", "name")
    return Vector.of(entry)


@router.post(
    "/vectors",
    status_code=201,
    responses={
        200: {"model": Vector, "description": "replaced"},
        **_documented(400, 403, 409, 422, 503),
    },
)
async def put_vector(wish: NewVector, operator: Operator, response: Response) -> Vector:
    """Adds a vector from admin.folder, or replaces one for the requests that follow."""
    given = wish.model_dump(exclude={"name", "replace"}, exclude_none=True)
    if await operator.changes.put(wish.name, given, wish.replace):
        response.status_code = 200
    entry = operator.catalogue.vectors.get(wish.name)
    if entry is None:
        raise Refusal(409, f"name: {short(wish.name)} has been removed again meanwhile", "name")
    return Vector.of(entry)


@router.delete("/vectors/{name}", responses=_documented(403, 409, 422, 503))
async def delete_vector(name: str, operator: Operator) -> Deleted:
    """Removes a vector for the requests that follow."""
    await operator.changes.remove(name)
    return Deleted(name=name)


@router.post("/reload", responses=_documented(403, 409, 422, 503))
async def reload(operator: Operator) -> Reloaded:
    """Makes the catalogue what the YAML says now, as a restart would."""
    return Reloaded(**await operator.changes.reload())


@router.post("/disable", responses=_documented(503))
async def disable(operator: Operator) -> Switched:
    """Turns steering off at once: who asks for it gets 503, everybody else plain answers."""
    return _switched(operator, False)


@router.post("/enable", responses=_documented(503))
async def enable(operator: Operator) -> Switched:
    """Turns steering on again."""
    return _switched(operator, True)


def _switched(operator: Console, enabled: bool) -> Switched:
    try:
        operator.registry.set_enabled(enabled)
    except TimeoutError as error:
        raise Refusal(503, str(error)) from error
    logger().warning("grains: steering enabled=%s", str(enabled).lower())
    return Switched(enabled=enabled)
