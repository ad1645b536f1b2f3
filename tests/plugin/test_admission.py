"""Engines that cannot be steered are refused before they start, through vLLM's own EngineArgs."""

import argparse
import os
from importlib import import_module

import pytest
import torch

from grains_vllm import plugin
from grains_vllm.admission import require_engine
from grains_vllm.catalogue import catalogue_of
from grains_vllm.errors import GrainsConfigError
from grains_vllm.vectors import ModelFingerprint, SteeringVector
from tests.tiny import REFERENCE_NORM, save_world
from tests.vision import ARCHITECTURE, HIDDEN, LAYERS, NAMES, save_vision


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("admission")
    for name in ("llama", "gpt2"):
        save_world(folder, name)
    return folder


@pytest.fixture
def vllm_config(world, monkeypatch):
    """vllm_config(model, yaml, **engine_args) -> the VllmConfig that an engine would get."""
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")  # Restored even where it was not set.
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    plugin.register()

    def build(model="llama", yaml="llama.yaml", steered=True, **more):
        return EngineArgs(
            model=str(world / model),
            skip_tokenizer_init=True,
            additional_config={"grains": {"config": str(world / yaml)}} if steered else {},
            **more,
        ).create_engine_config()

    yield build
    plugin.unregister()


def test_a_plain_engine_is_admitted_and_keyed_apart(vllm_config, world):
    from vllm.engine.arg_utils import EngineArgs

    steered = vllm_config()
    grains = steered.additional_config["grains"]
    assert [entry["name"] for entry in grains["resolved"]] == ["a", "b", "c", "d"]
    plain = EngineArgs(model=str(world / "llama"), skip_tokenizer_init=True).create_engine_config()
    assert plain.compute_hash() != steered.compute_hash()  # The compile cache's key.


def test_engine_args_stay_as_the_user_wrote_them(world, vllm_config):
    from vllm.engine.arg_utils import EngineArgs

    asked = {"grains": {"config": str(world / "llama.yaml")}}
    args = EngineArgs(model=str(world / "llama"), skip_tokenizer_init=True, additional_config=asked)
    first, second = args.create_engine_config(), args.create_engine_config()
    assert args.additional_config == asked
    assert first.additional_config == second.additional_config


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2}},
         "--speculative-config of a method other than ngram and draft_model"),
        ({"model_impl": "transformers"}, "cannot be used with --model-impl transformers"),
        ({"kv_sharing_fast_prefill": True}, "cannot be used with --kv-sharing-fast-prefill"),
        ({"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
         "cannot be used with --kv-transfer-config"),
        ({"runner": "pooling"}, "cannot be used with a model that does not generate"),
        ({"data_parallel_size": 2, "data_parallel_size_local": 1},
         "data-parallel ranks behind several servers or on several machines"),
    ],
)  # fmt: skip
def test_refuses(vllm_config, more, message):
    with pytest.raises(GrainsConfigError) as error:
        vllm_config(**more)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "more",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        {"enable_lora": True},
        {"data_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"tensor_parallel_size": 2},
    ],
)
def test_admits_what_the_engine_tests_prove(vllm_config, more):
    assert vllm_config(**more).additional_config["grains"]["resolved"]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model_config", "enable_sleep_mode"), True, "cannot be used with --enable-sleep-mode"),
    ],
)
def test_refuses_what_a_cpu_cannot_be_asked_for(vllm_config, world, place, value, message):
    found = vllm_config()  # admitted so far
    setattr(getattr(found, place[0]), place[1], value)
    with pytest.raises(GrainsConfigError) as error:
        require_engine(found, catalogue_of(found))
    assert message in str(error.value)


@pytest.fixture(scope="module")
def vision_world(world):
    """A folder with the image models and YAMLs for them."""
    for name in NAMES:
        save_vision(world, name)
        vector = SteeringVector(
            torch.eye(LAYERS, HIDDEN),
            torch.full((LAYERS,), REFERENCE_NORM),
            ModelFingerprint(ARCHITECTURE[name], HIDDEN, LAYERS),
        )
        vector.save(world / f"{name}.safetensors")
        line = f"vectors: {{a: {{path: {name}.safetensors, strength: 1, positions: text}}}}\n"
        (world / f"{name}.yaml").write_text(line)
    return world


@pytest.mark.parametrize("name", NAMES)
def test_admits_image_models(vllm_config, vision_world, name):
    config = vllm_config(name, f"{name}.yaml")
    assert config.model_config.architecture == ARCHITECTURE[name]
    assert config.additional_config["grains"]["resolved"][0]["positions"] == "text"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds and a multimodal model"),
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"mm_encoder_only": True}, "--mm-encoder-only"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_consumer"}},
         "--ec-transfer-config"),
    ],
)  # fmt: skip
def test_refuses_with_image_models(vllm_config, vision_world, more, message):
    with pytest.raises(GrainsConfigError) as error:
        vllm_config("qwen2_5_vl", "qwen2_5_vl.yaml", **more)
    assert f"--enable-grains cannot be used with {message}: " in str(error.value)


def test_admits_an_image_model_for_text_alone(vllm_config, vision_world):
    assert vllm_config("llava", "llava.yaml", language_model_only=True)


def test_refuses_other_multimodal_models_by_name(vllm_config, vision_world, monkeypatch):
    found = vllm_config("llava", "llava.yaml")
    monkeypatch.setattr(found.model_config, "_architecture", "Qwen3VLForConditionalGeneration")
    with pytest.raises(GrainsConfigError) as error:
        require_engine(found, catalogue_of(found))
    message = str(error.value)
    assert "the multimodal model Qwen3VLForConditionalGeneration; known are" in message
    assert all(name in message for name in ARCHITECTURE.values())


def test_refuses_a_server_that_does_not_check_model_names(vllm_config, monkeypatch):
    monkeypatch.setenv("VLLM_SKIP_MODEL_NAME_VALIDATION", "1")
    with pytest.raises(GrainsConfigError, match="VLLM_SKIP_MODEL_NAME_VALIDATION=1"):
        vllm_config()


def test_refuses_two_catalogues(vllm_config, world):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = [
        "--model",
        str(world / "llama"),
        "--enable-grains",
        "--grains-config",
        "x.yaml",
        "--additional-config",
    ]
    args = parser.parse_args([*flags, '{"grains": {}}'])
    with pytest.raises(GrainsConfigError, match="are two catalogues"):
        EngineArgs.from_cli_args(args)


def test_api_servers_find_the_catalogue_before_they_load_plugins(vllm_config, world):
    """As --api-server-count starts them: the parent's arguments, in a process without wrappers."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    path = str(world / "llama.yaml")
    flags = ["--model", str(world / "llama"), "--enable-grains", "--grains-config", path]
    args = parser.parse_args(flags)
    for _ in range(2):
        EngineArgs.from_cli_args(args)
    plugin.unregister()
    assert EngineArgs.from_cli_args(args).additional_config == {"grains": {"config": path}}


@pytest.fixture
def triton(monkeypatch):
    """As on a GPU; without it vLLM has no V2 runner."""
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)


@pytest.mark.parametrize("chosen", [None, "0", "1"])
def test_the_model_runner_is_vllms_own_choice(vllm_config, triton, monkeypatch, chosen):
    if chosen is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", chosen)
    steered, plain = vllm_config(), vllm_config(steered=False)
    assert steered.use_v2_model_runner == plain.use_v2_model_runner
    assert steered.use_v2_model_runner == (chosen == "1") or chosen is None
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == chosen


RANKS = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


@pytest.mark.parametrize("ranks", RANKS)
def test_several_ranks_run_on_v1_unless_told_otherwise(vllm_config, triton, monkeypatch, ranks):
    assert not vllm_config(**{ranks: 2}).use_v2_model_runner
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(GrainsConfigError, match=r"parallelism.*set VLLM_USE_V2_MODEL_RUNNER=0"):
        vllm_config(**{ranks: 2})


@pytest.mark.parametrize(
    ("chosen", "other", "module", "method"),
    [
        ("0", "1", "vllm.v1.worker.gpu_model_runner", "_prepare_inputs"),
        ("1", "0", "vllm.v1.worker.gpu.model_runner", "prepare_inputs"),
    ],
)
def test_refuses_only_the_runner_that_lacks_a_symbol(
    vllm_config, triton, monkeypatch, chosen, other, module, method
):
    monkeypatch.delattr(import_module(module).GPUModelRunner, method)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", chosen)
    with pytest.raises(GrainsConfigError, match=rf"which lacks {module}.*no attribute '{method}'"):
        vllm_config()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", other)
    assert vllm_config()


def test_refuses_another_models_vectors_naming_both(vllm_config):
    with pytest.raises(GrainsConfigError, match=r"'LlamaForCausalLM'.*'GPT2LMHeadModel'"):
        vllm_config(model="gpt2")


def test_refuses_everything_on_an_unsupported_vllm(world, monkeypatch):
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    plugin.register()
    try:
        EngineArgs(model=str(world / "llama"), skip_tokenizer_init=True).create_engine_config()
        with pytest.raises(
            GrainsConfigError, match=r"supports vLLM 0\.26 to 0.33, but vLLM 0.99.0"
        ):
            EngineArgs(
                model=str(world / "llama"), additional_config={"grains": {"config": "x.yaml"}}
            ).create_engine_config()
    finally:
        plugin.unregister()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--enable-grains"], "--enable-grains needs --grains-config FILE"),
        (["--grains-config", "x.yaml"], "without --enable-grains"),
        (["--enable-grains", "--grains-config", "x.yaml", "--grpc"], "cannot be used with --grpc"),
    ],
)
def test_flags_that_do_not_go_together(vllm_config, world, argv, message):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    parser.add_argument("--grpc", action="store_true")  # as `vllm serve` has it
    args = parser.parse_args(["--model", str(world / "llama"), *argv])
    assert isinstance(args, argparse.Namespace)
    with pytest.raises(GrainsConfigError, match=message):
        EngineArgs.from_cli_args(args)
