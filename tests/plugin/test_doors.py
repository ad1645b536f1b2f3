"""Which routes exist, what this package has decided about each, and what is refused where."""

from types import SimpleNamespace
from typing import get_args

import pytest

from grains_vllm import doors
from grains_vllm.likeness import likeness
from grains_vllm.selection import FIELDS, SelectionError


def test_somebody_has_decided_about_every_route(monkeypatch):
    """The real app of this vLLM, with everything that can be attached."""
    from vllm import tasks
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    monkeypatch.setenv("VLLM_PLUGINS", "grains")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--enable-scale-out"])
    args.enable_fault_tolerance = args.enable_tokenizer_info_endpoint = True
    kinds = ("GenerationTask", "PoolingTask", "FrontendTask")
    supported = tuple(task for kind in kinds for task in get_args(getattr(tasks, kind)))
    model = SimpleNamespace(
        is_generative=True, get_pooling_task=lambda _: "embed", hf_config=SimpleNamespace()
    )
    app = build_app(args, supported, model)
    routes = {route.path for route in app.routes}
    assert {"/v1/chat/completions", "/invocations", "/v1/grains/vectors"} <= routes
    assert sorted(route for route in routes if not doors.decided(route)) == []


@pytest.mark.parametrize(
    ("path", "door"),
    [
        ("/v1/completions", doors.OPEN),
        ("/v1/completions/", doors.OPEN),  # which vLLM redirects
        ("/v1/responses/resp_1/cancel", doors.IDLE),
        ("/v1/responses/resp_1", doors.UNDECIDED),  # to a POST; a GET starts nothing
        ("/v1/responses/compact", doors.UNDECIDED),
        ("/v1/grains/vectors/a", doors.IDLE),
        ("/", doors.IDLE),
        ("/v1/completions/of/tomorrow", doors.UNDECIDED),
        ("/v2/chat", doors.UNDECIDED),
        ("/metricsandmore", doors.UNDECIDED),
    ],
)
def test_door_of(path, door):
    assert doors.door_of(path) is door


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"steering": "a"}, "steering"),
        ({"steering_strength": 1}, "steering_strength"),
        ({"Steering": "a"}, "Steering"),
        ({" steering": "a"}, "' steering'"),
        ({"_steering": "a"}, "_steering"),
        ({"steering-positions": "all"}, "'steering-positions'"),
        ({"\uff53teering": "a"}, "'\uff53teering'"),
        ({"s\u0442\u0435\u0435ring": "a"}, "'s\u0442\u0435\u0435ring'"),
        ({"steerin\u0261": "a"}, "'steerin\u0261'"),
        ({"ste\u200bering": "a"}, "'ste\\u200bering'"),
        ({"ste\u0301ering": "a"}, "'ste\u0301ering'"),
        ({"steering\ud800": "a"}, "'steering\\ud800'"),
        ({"VLLM_XARGS": {}}, "VLLM_XARGS"),
        ({"vllmXargs": {}}, "vllmXargs"),
        ({"vllm-xargs": {}}, "'vllm-xargs'"),
        ({"vllm_xarg": {}}, "vllm_xarg"),
        ({"extra_body": {"vllm_xargs": {}}}, "vllm_xargs"),
        ({"extra_args": {"steering": "a"}}, "steering"),
        ({"extra_body": {"extra_args": {"steering": "a"}}}, "steering"),
        ({"sampling_params": {"steering": "a"}}, "steering"),
        ({"steer": "a"}, "steer"),
        ({"grains": "a"}, "grains"),
        ({"extraBody": {"vllm_xargs": {}}}, "vllm_xargs"),
        ({"extra_body": [{"vllm_xargs": {}}]}, "vllm_xargs"),
        ({"whatever": {"deeper": [[{"and deeper": {"steering": "none"}}]]}}, "steering"),
        ({"parameters": {"steering": "a"}}, "steering"),
        ({"model_kwargs": {"xargs": {"steering": "a"}}}, "steering"),
    ],
)
def test_what_would_be_ignored_is_named(body, key):
    with pytest.raises(SelectionError) as error:
        doors.require_heard(body, doors.OPEN)
    assert str(error.value).startswith(f"{key}: belongs into the request's vllm_xargs")


@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": {"anything": 1}},
        {"system": "a", "stream": True, "stop": [], "store": False, "user": "steering"},
        {"tools": [{"function": {"parameters": {"properties": {"steering": {}}}}}]},
        {"metadata": {"steering": "wheel"}},
        {"extra_args": {"other": 1}, "extra_body": "steering", "日本語の車の操舵": 1},
        {1: 2},
    ],
)
def test_what_is_nobodys_passes(body):
    doors.require_heard(body, doors.OPEN)


@pytest.mark.parametrize(
    "body",
    [
        {f"{number} yrevE": 1 for number in range(10**5)},
        {"a": [{"b": number} for number in range(10**5)]},
        {"\ufdfa" * 10**6: 1, **{str(number): 1 for number in range(1001)}},
    ],
)
def test_nobody_can_keep_others_waiting(body):
    with pytest.raises(SelectionError, match="request: it holds more than 1000 unknown keys"):
        doors.require_heard(body, doors.OPEN)


@pytest.mark.parametrize("name", FIELDS)
def test_a_letter_of_another_script_stands_for_any(name):
    for at in range(len(name)):
        if name[at].isalpha():
            assert likeness(f"{name[:at]}\u0430{name[at + 1 :]}", FIELDS) is not None
