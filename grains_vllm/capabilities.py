"""What a server can do, for clients that want to know before they ask."""

from importlib.metadata import version
from typing import Any, Literal

import vllm
from pydantic import BaseModel, Field

from grains_vllm import __version__
from grains_vllm.checks import MAX_STRENGTH
from grains_vllm.config import SCALES
from grains_vllm.positions import ALLOWED
from grains_vllm.registry import Snapshot
from grains_vllm.selection import FIELDS
from grains_vllm.shift import FORMULA_VERSION
from grains_vllm.vectors import FORMAT_VERSION, LAYER_CONVENTION


class Versions(BaseModel):
    grains: str
    vllm: str
    torch: str
    formula: int
    artifact_format: int
    layer_convention: str


class Model(BaseModel):
    architecture: str
    hidden_size: int
    num_layers: int


class RequestLimits(BaseModel):
    slots: int
    max_vectors_per_request: int
    max_strength: float


class ChangeLimits(BaseModel):
    """What may be added while serving; null where the catalogue is fixed."""

    max_vectors: int
    max_bytes: int


class LayerOutput(BaseModel):
    """How the model's layers hand on their residual stream."""

    convention: str | None = Field(
        description="as the YAML says; null: as grains-vllm knows of the layers' classes"
    )
    evidence: Literal["known", "unchecked"]


class Supported(BaseModel):
    fields: list[str]
    positions: str
    scales: list[str]
    composition: bool
    prefix_caching: bool
    reload: bool


class Capabilities(BaseModel):
    enabled: bool
    versions: Versions
    model: Model
    layers: list[int]
    layer_output: LayerOutput
    limits: RequestLimits
    changes: ChangeLimits | None
    runner: str
    api_servers: int
    data_parallel_size: int
    supported: Supported


def capabilities(vllm_config: Any, snapshot: Snapshot) -> Capabilities:
    """Describes this server.

    Args:
        vllm_config: vllm.config.VllmConfig of its engine.
    """
    catalogue, parallel = snapshot.catalogue, vllm_config.parallel_config
    limits, admin = catalogue.limits, catalogue.admin
    return Capabilities(
        enabled=snapshot.enabled,
        versions=Versions(
            grains=__version__,
            vllm=vllm.__version__,
            torch=version("torch"),
            formula=FORMULA_VERSION,
            artifact_format=FORMAT_VERSION,
            layer_convention=LAYER_CONVENTION,
        ),
        model=Model(
            architecture=catalogue.model.architecture,
            hidden_size=catalogue.model.hidden_size,
            num_layers=catalogue.model.num_layers,
        ),
        layers=list(limits.layers),
        layer_output=LayerOutput(
            convention=catalogue.layer_output,
            evidence="unchecked" if catalogue.unchecked else "known",
        ),
        limits=RequestLimits(
            slots=limits.slots,
            max_vectors_per_request=limits.max_vectors_per_request,
            max_strength=MAX_STRENGTH,
        ),
        changes=None
        if admin is None
        else ChangeLimits(max_vectors=admin.max_vectors, max_bytes=admin.max_bytes),
        runner="v2" if vllm_config.use_v2_model_runner else "v1",
        api_servers=parallel._api_process_count,
        data_parallel_size=parallel.data_parallel_size,
        supported=Supported(
            fields=list(FIELDS),
            positions=ALLOWED,
            scales=list(SCALES),
            composition=limits.max_vectors_per_request > 1,
            prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
            reload=admin is not None and bool(admin.source),
        ),
    )
