"""The flags --enable-grains and --grains-config, and how they become `additional_config["grains"]`.

vLLM has no interface for new flags. `additional_config` is its field for third parties: it travels
to the engine core and to every worker, and it is part of the compile-cache key.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from grains_vllm.catalogue import KEY
from grains_vllm.config import read_catalogue
from grains_vllm.errors import GrainsConfigError

# vLLM's own list of ASGI middleware, as --middleware fills it.
MIDDLEWARE = (
    "grains_vllm.receipts_http.ReceiptMiddleware",
    "grains_vllm.metrics_http.MetricsMiddleware",
    "grains_vllm.door_http.DoorMiddleware",
)


def _add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        group = parser.add_argument_group(
            title="GrainsConfig",
            description="Steering vectors per request: --enable-grains, --grains-config.",
        )
        group.add_argument(
            "--enable-grains",
            action="store_true",
            help="Serve steering vectors; needs --grains-config.",
        )
        group.add_argument(
            "--grains-config",
            metavar="FILE",
            help="YAML catalogue of the steering vectors that requests may name.",
        )
        return parser

    return add_cli_args


def _from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def from_cli_args(cls: type, args: Any) -> Any:
        engine_args = original(cls, args)
        enabled = getattr(args, "enable_grains", False)
        path = getattr(args, "grains_config", None)
        if enabled and not path:
            raise GrainsConfigError("--enable-grains needs --grains-config FILE")
        if path and not enabled:
            raise GrainsConfigError("--grains-config was given without --enable-grains")
        if enabled and getattr(args, "grpc", False):
            raise GrainsConfigError(
                "--enable-grains cannot be used with --grpc: nobody has compared what its requests "
                "can carry"
            )
        if enabled:
            additional, mine = engine_args.additional_config or {}, {"config": path}
            if additional.get(KEY, mine) != mine:
                raise GrainsConfigError(
                    f"--grains-config and --additional-config's {KEY!r} are two catalogues; "
                    "give one of them"
                )
            engine_args.additional_config = {**additional, KEY: mine}
            # The API servers of --api-server-count get these arguments, and make engine arguments
            # of them before their process has loaded any plugin.
            args.additional_config = engine_args.additional_config
            if hasattr(args, "middleware"):  # only servers have it
                missing = [name for name in MIDDLEWARE if name not in args.middleware]
                # First is innermost: receipts are written before anything is compressed.
                args.middleware = [*missing, *args.middleware]
        return engine_args

    return from_cli_args


def _create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(self, "additional_config", None)
        if not isinstance(asked, dict) or KEY not in asked:
            return original(self, *args, **kwargs)
        from grains_vllm.admission import prefer_compared_runner, require_engine
        from grains_vllm.plugin import enable
        from grains_vllm.registry import share

        enable()
        catalogue = read_catalogue(asked[KEY])
        prefer_compared_runner(self)
        self.additional_config = {**asked, KEY: catalogue.to_json()}
        try:
            vllm_config = original(self, *args, **kwargs)
        finally:
            # The user's object stays as the user wrote it, so that it can build another engine.
            self.additional_config = asked
        require_engine(vllm_config, catalogue)
        share(vllm_config)
        return vllm_config

    return create_engine_config


ENGINE_ARGS = {
    "add_cli_args": _add_cli_args,
    "from_cli_args": _from_cli_args,
    "create_engine_config": _create_engine_config,
}
