"""The flags --enable-grains and --grains-config, and how they become `additional_config["grains"]`.

vLLM has no interface for new flags. `additional_config` is its field for third parties: it travels
to the engine core and to every worker, and it is part of the compile-cache key.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from grains_vllm.config import KEY, Catalogue, read_catalogue
from grains_vllm.errors import GrainsConfigError


def wrappers(unsupported: str | None) -> dict[str, Callable[[Any], Any]]:
    """The wrappers of EngineArgs, by method name.

    Args:
        unsupported: why this vLLM cannot be steered; raised as soon as somebody asks for it.
    """

    def add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wrapped(parser: Any) -> Any:
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

        return wrapped

    def from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wrapped(cls: type, args: Any) -> Any:
            engine_args = original(cls, args)
            enabled = getattr(args, "enable_grains", False)
            path = getattr(args, "grains_config", None)
            if enabled and not path:
                raise GrainsConfigError("--enable-grains needs --grains-config FILE")
            if path and not enabled:
                raise GrainsConfigError("--grains-config was given without --enable-grains")
            if enabled:
                engine_args.additional_config = {
                    **(engine_args.additional_config or {}),
                    KEY: {"config": path},
                }
            return engine_args

        return wrapped

    def create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            additional = self.additional_config
            if not isinstance(additional, dict) or KEY not in additional:
                return original(self, *args, **kwargs)
            if unsupported is not None:
                raise GrainsConfigError(unsupported)
            return _steered_config(self, read_catalogue(additional[KEY]), original, args, kwargs)

        return wrapped

    return {
        "add_cli_args": add_cli_args,
        "from_cli_args": from_cli_args,
        "create_engine_config": create_engine_config,
    }


def _steered_config(
    engine_args: Any, catalogue: Catalogue, original: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    from grains_vllm.admission import prefer_v1_runner, require_engine

    prefer_v1_runner()
    asked = engine_args.additional_config
    engine_args.additional_config = {**asked, KEY: catalogue.to_json()}
    try:
        vllm_config = original(engine_args, *args, **kwargs)
    finally:
        # The user's object stays as the user wrote it, so that it can build another engine.
        engine_args.additional_config = asked
    require_engine(vllm_config, catalogue)
    return vllm_config
