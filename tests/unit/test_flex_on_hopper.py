"""What torch's compiler and Triton make of flex attention for an H100 that need not be there: whether it fits, and
whether one kernel serves all lengths. It stands on insides of torch, which may move: 2.11 and 2.13 were tried.

python -m pytest tests/unit/test_flex_on_hopper.py -m slow
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn.attention import flex_attention as torch_flex

from bridge.megatron.attention_backends import flex
from bridge.megatron.mask import mask_of
from bridge.megatron.visibility import MaskRule, Visibility

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

HOPPER, AMPERE = (9, 0), (8, 0)
SHARED_OF_AN_H100 = 232_448
# Heads, query groups, head dim, window: sliding and global layers of 31B.
LAYERS = {256: (32, 16, 256, 1024), 512: (32, 4, 512, None)}
BF16 = torch.bfloat16


@contextmanager
def gpu(capability: tuple[int, int]) -> Iterator[None]:
    """A machine that says it has such a GPU, for code that only asks."""
    from torch._dynamo import device_interface
    from torch._inductor import scheduler
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    number = 10 * capability[0] + capability[1]
    properties = SimpleNamespace(
        type="cuda",
        index=0,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=132,
        name="",
        warp_size=32,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        gcnArchName="",
    )
    interface = device_interface.CudaInterface
    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32), get_current_device=lambda: 0, utils=SimpleNamespace()
    )
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda *_: capability),
            (torch.cuda, "get_device_properties", lambda *_: properties),
            (torch.cuda, "_get_device_properties", lambda *_: properties),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "_lazy_init", lambda: None),
            (interface.Worker, "get_device_properties", staticmethod(lambda *_: properties)),
            (interface.Worker, "current_device", staticmethod(lambda: 0)),
            (interface, "get_compute_capability", staticmethod(lambda *_: number)),
            (scheduler, "has_triton", lambda *_: True),
            (driver, "_active", target),
            (fake_tensor, "init_gpu_context", lambda *_: None),
        ):
            stack.enter_context(patch.object(owner, name, value, create=True))
        yield


def trace(
    layers: list[int], lengths: list[int], options: Callable[[int], Any], lse: bool = False
) -> list[tuple[Any, list[Any]]]:
    """The graphs, forward and backward, of attention in such layers at such lengths, with what they are given.

    `lse`: of `attend_with_lse`, which has no gradient of its own.
    """
    graphs: list[tuple[Any, list[Any]]] = []

    def keep(graph: Any, inputs: list[Any]) -> Any:
        from functorch.compile import make_boxed_func

        graphs.append((graph, list(inputs)))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        torch_flex.flex_attention, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    # Traced on a CPU, for which torch refuses the backward pass, and lowered for a GPU.
    with patch.object(torch_flex, "_validate_device", lambda *_: None):
        for length, layer in product(lengths, layers):
            heads, groups, d, window = LAYERS[layer]
            mask = mask_of(Visibility.of(torch.zeros(1, length, dtype=torch.int64)), MaskRule(window, "causal"))
            blocks = flex.block_mask(mask, flex.block_size(d))
            with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(not lse):
                tensors = [
                    torch.empty(length, 1, n, d, dtype=BF16, requires_grad=not lse) for n in (heads, groups, groups)
                ]
                output = compiled(
                    *(x.permute(1, 2, 0, 3) for x in tensors),
                    block_mask=blocks,
                    scale=1.0,
                    enable_gqa=True,
                    kernel_options=options(d),
                    return_aux=torch_flex.AuxRequest(lse=True) if lse else None,
                )
                if lse:
                    assert output[1].lse.shape == (1, heads, length) and output[1].lse.dtype is torch.float32
                else:
                    output.backward(torch.empty_like(output))
    return graphs


def source(graph: Any, inputs: list[Any]) -> str:
    """The program that torch writes for a graph of `trace`, on the GPU of the context."""

    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")

    mode = next(x.fake_mode for x in inputs if isinstance(x, FakeTensor))
    for module in (m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in module.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
            if "flex_attention" in str(node.target):  # a CPU keeps no log-sum-exp
                node.args = tuple({**a, "OUTPUT_LOGSUMEXP": True} if isinstance(a, dict) else a for a in node.args)
            if "val" in node.meta:
                node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta["val"])
    inputs = [moved(x) for x in inputs]
    lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
    with V.set_graph_handler(lowering), V.set_fake_mode(mode), V.set_debug_handler(MagicMock()):
        lowering.run(*inputs)
        code = lowering.codegen()[0]
    return getattr(code, "value", code)


def compiled(program: str, folder: Path, capability: tuple[int, int]) -> dict[str, int]:
    """Bytes of shared memory a program and of stack a thread, and matrix instructions of the attention kernel in it."""
    import triton
    from triton.backends.compiler import GPUTarget

    ((_, text),) = re.findall(r"(triton_tem\w+) = async_compile\.triton\('\w+', '''(.*?)'''", program, re.S)
    meta: dict[str, Any] = {}
    (folder / "kernel.py").write_text(text.replace("triton_heuristics.template(", "keep("), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("kernel", folder / "kernel.py")
    assert spec is not None and spec.loader is not None
    module = ModuleType("kernel")
    module.keep = lambda **said: meta.update(said) or (lambda function: function)  # type: ignore[attr-defined]
    module.__spec__, module.__file__ = spec, str(folder / "kernel.py")
    spec.loader.exec_module(module)
    kernel = next(value for key, value in vars(module).items() if key.startswith("triton_tem"))
    constants = meta["triton_meta"]["constants"]
    made = triton.compile(
        triton.compiler.ASTSource(
            kernel, meta["triton_meta"]["signature"], constants, meta["triton_meta"]["configs"][0]
        ),
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={"num_warps": meta["num_warps"], "num_stages": meta["num_stages"]},
    )
    (folder / "cubin").write_bytes(made.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    said = subprocess.run([tool, "-res-usage", folder / "cubin"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+)", said)
    assert found is not None
    return {
        "shared": made.metadata.shared,
        "stack": int(found[1]),
        "wgmma": made.asm["ptx"].count("wgmma.mma_async"),
        "mma": made.asm["ptx"].count("mma.sync"),
    }


@pytest.mark.parametrize("layer", LAYERS)
def test_the_forward_pass_for_another_backward(layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of `flex_triton` is the same kernel, with the log-sum-exp as an output."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ((graph, inputs),) = trace([layer], [4096], lambda d: flex.kernel_options(d, BF16, HOPPER), lse=True)
    with gpu(HOPPER):
        made = compiled(source(graph, inputs), tmp_path, HOPPER)
    assert made["shared"] <= SHARED_OF_AN_H100 and made["stack"] == 0 and made["wgmma"] and not made["mma"]


def both(layer: int, folder: Path, capability: tuple[int, int]) -> list[dict[str, int]]:
    """Of the forward and of the backward kernel."""
    graphs = trace([layer], [4096], lambda d: flex.kernel_options(d, BF16, capability))
    with gpu(capability):
        return [compiled(source(*graph), folder, capability) for graph in graphs]


@pytest.mark.parametrize("layer", LAYERS)
def test_hopper_has_room_for_the_tiles(layer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared memory; forward everything in registers; backward little beside them (torch's own tiles: 1,648 bytes)."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forward, backward = both(layer, tmp_path, HOPPER)
    assert max(forward["shared"], backward["shared"]) <= SHARED_OF_AN_H100
    assert forward["stack"] == 0 and forward["wgmma"] and not forward["mma"]
    assert backward["stack"] <= 400
    assert layer > 256 or backward["wgmma"]


def test_other_gpus_have_room_for_large_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert max(kernel["shared"] for kernel in both(512, tmp_path, AMPERE)) <= flex._LARGE_HEAD_SHARED - 1024


def test_one_kernel_comes_to_serve_all_lengths() -> None:
    """Of each kind of layer: the first length has its own, the second the one for all."""
    layers, lengths = [256, 512], [4096, 6144, 8192, 7168]
    counters.clear()
    graphs = trace(layers, lengths, lambda d: flex.kernel_options(d, BF16, HOPPER))
    assert counters["stats"]["unique_graphs"] == 2 * len(layers)
    with gpu(HOPPER):
        for graph in graphs:
            assert re.search(r"'GQA_SHARED_HEADS': \d+", source(*graph))  # a number, not a symbol
