"""The code that Inductor generates for a piece, also for a CUDA GPU on a machine without one.

The piece is traced with tensors that hold no data and generated, not run: a look at what would be
fused, not at how fast it is. What asks the GPU for its properties is answered from a fixed record.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils._triton
from torch import Tensor, nn
from torch._dynamo import device_interface
from torch._dynamo.source import ConstantSource
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

TOKENS = 16  # what the compiler takes for typical; the axis stays dynamic
_H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


@dataclass(frozen=True)
class Kernel:
    """One generated kernel.

    Attributes:
        passes: loops over a token's elements, one after the other; 0 if they stay in registers.
        loads, stores: of whole rows, [tokens, hidden].
    """

    name: str
    passes: int
    loads: int
    stores: int


def triton_kernels(code: str) -> list[Kernel]:
    """The Triton kernels that generated code launches, in the order of their definition."""
    found = []
    for name, body in re.findall(r"def (triton_\w+)\(.*?\):\n(.*?)\n''', device_str", code, re.S):
        found.append(
            Kernel(
                name,
                body.count("for r0_offset in"),
                len(re.findall(r"tl\.load\([^\n]*r0_1 \+ ", body)),
                len(re.findall(r"tl\.store\([^\n]*r0_1 \+ ", body)),
            )
        )
    launched = set(re.findall(r"(triton_\w+)\.run\(", code))
    return [kernel for kernel in found if kernel.name in launched]


def cpp_token_loops(code: str) -> int:
    """Loops over the tokens in generated C++; whatever is fused is inside one of them."""
    return len(re.findall(r"for\(int64_t x0=", code))


def generate(module: nn.Module, hidden: int, dtype: torch.dtype, device: str) -> str:
    """The code of module(attention, residual), both [tokens, hidden], tokens a dynamic axis.

    Args:
        device: "cpu" or "cuda".
    """
    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    source = ConstantSource("tokens")
    symbol = shapes.create_symbol(TOKENS, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    tokens = shapes.create_symintnode(symbol, hint=TOKENS, source=source)
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def forward(attention: Tensor, residual: Tensor, *tensors: Tensor) -> Any:
        arguments = dict(zip(state, tensors, strict=True))
        return torch.func.functional_call(module, arguments, (attention, residual))

    with ExitStack() as stack:
        if device == "cuda":
            stack.enter_context(_pretended_gpu())
        with mode:
            shaped: list[tuple[Any, ...]] = [((tokens, hidden), (hidden, 1), dtype)] * 2
            shaped += [(t.size(), t.stride(), t.dtype) for t in state.values()]
            # Tracing happens on the CPU: on a device that is not there, slicing would ask for it.
            traced, tensors = (
                [torch.empty_strided(*size, dtype=kind, device=place) for *size, kind in shaped]
                for place in ("cpu", device)
            )
            graph = make_fx(forward, decomposition_table=select_decomp_table())(*traced)
            graph = torch.fx.GraphModule(graph, fx_graph_cse(graph.graph))
            FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*tensors)
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(V.set_fake_mode(mode))
        return _code(graph, tensors)


def _code(graph: Any, tensors: list[Tensor]) -> str:
    generated = []

    def keep_the_code(lowered: GraphLowering) -> Any:
        generated.append(lowered.codegen()[0].value)
        return SimpleNamespace(call=None)  # in place of the module that would be built from it

    with (
        mock.patch.object(GraphLowering, "compile_to_module", keep_the_code),
        # Neither an older answer, nor a look whether this machine's compiler can build it.
        torch._inductor.config.patch({"fx_graph_cache": False, "cpp.vec_isa_ok": True}),
    ):
        compile_fx.compile_fx_inner(graph, tensors)
    (code,) = generated
    return code


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    class Interface(device_interface.CudaInterface):
        class Worker:
            set_device = staticmethod(lambda device: None)
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: _H100)

        current_device = staticmethod(lambda: 0)
        device_count = staticmethod(lambda: 1)
        is_available = staticmethod(lambda: True)
        get_compute_capability = staticmethod(lambda device=None: 90)
        get_device_properties: Any = staticmethod(lambda device=None: _H100)
        get_raw_stream = staticmethod(lambda device=None: 0)
        synchronize = staticmethod(lambda device=None: None)
        is_triton_capable = staticmethod(lambda device=None: True)
        raise_if_triton_unavailable = staticmethod(lambda device=None: None)

    answers: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.get_device_properties": lambda device=None: _H100,
        "torch.cuda._get_device_properties": lambda device=None: _H100,
        "torch.cuda.get_device_capability": lambda device=None: (9, 0),
        "torch.cuda.get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda *_: None,
        "torch.cuda.current_stream": lambda *_: None,
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda._exchange_device": lambda index: 0,
        "torch.cuda._maybe_exchange_device": lambda index: 0,
        "torch.utils._triton.triton_hash_with_backend": lambda: "none",
    }
    with ExitStack() as stack:
        _forget_triton()
        stack.callback(_forget_triton)
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer, create=True))
        device_interface.get_interface_for_device("cpu")  # fills the table before it is copied
        table = {**device_interface.device_interfaces, "cuda": Interface, "cuda:0": Interface}
        stack.enter_context(mock.patch.dict(device_interface.device_interfaces, table))
        yield


def _forget_triton() -> None:
    """What torch remembers of whether there is a GPU that Triton can use."""
    for remembered in vars(torch.utils._triton).values():
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()
