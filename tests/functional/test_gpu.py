"""On a GPU: parity at full width, determinism, no waits within a step, memory. `test_gpu_kit.py` runs it all on a CPU.

python -m pytest -m gpu tests/functional/test_gpu.py
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.case import Case
from benchmarks.lines import rows_of
from benchmarks.loss import measure as measure_loss
from benchmarks.random_model import RandomModel
from benchmarks.workers import Request, Workers
from bridge.megatron import fp8_experts
from bridge.toy.config import VARIANTS
from bridge.verify.parity import BF16_KL

from ..unit.fp8_products import products
from . import gpu_kit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")]

if torch.cuda.is_available():
    # What the deterministic runs need has to be said before the first product of the process, which is another test's.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SPECS = ["local"] + (["te"] if importlib.util.find_spec("transformer_engine") else [])
FLOAT32_RELATIVE = 1e-4
# Longer than two windows.
LENGTH = 2304
# Real widths, few layers, short enough to build in seconds.
SMALL = Case("e2b", "lora", 2048, recompute="full", size="shallow")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    gpu_kit.release()
    yield
    gpu_kit.release()


@pytest.mark.parametrize("layer_spec", SPECS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_in_bf16(variant: str, layer_spec: str) -> None:
    found = gpu_kit.logits_distance(RandomModel(variant, torch.bfloat16, "shallow"), LENGTH, layer_spec)
    assert found.kl <= BF16_KL


@pytest.mark.parametrize("layer_spec", SPECS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_parity_in_float32(variant: str, layer_spec: str) -> None:
    found = gpu_kit.logits_distance(RandomModel(variant, torch.float32, "shallow"), LENGTH, layer_spec)
    assert found.relative <= FLOAT32_RELATIVE


@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_deterministic_runs_are_alike(variant: str) -> None:
    case = replace(SMALL, variant=variant)
    first, second = gpu_kit.trained(case, 3), gpu_kit.trained(case, 3)
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(("variant", "media"), [("e2b", False), ("e4b", True), ("26b-a4b", False), ("12b", True)])
def test_the_host_waits_for_nothing_within_a_step(variant: str, media: bool, recompute: str) -> None:
    case = replace(SMALL, variant=variant, media=media, recompute=recompute)
    run = gpu_kit.build(case)
    batches = case.batches()
    for _ in range(2):  # kernels are compiled, buffers made
        gpu_kit.train(run, list(islice(batches, run.microbatches)))
    gpu_kit.forward_and_backward(run, list(islice(batches, run.microbatches)))


def test_experts_in_fp8() -> None:
    """torch's product and our rounding on the device against both by their definitions on a CPU, forward and backward.

    Both round the same numbers; the forward product sums in 14 bits. Nothing of it waits for the device.
    """
    torch.manual_seed(0)
    ends = torch.tensor([700, 700, 1500, 1503], dtype=torch.int32)
    x, weight, gradient = torch.randn(1503, 2816), torch.randn(4, 1408, 2816) * 0.02, torch.randn(1503, 1408)

    def run(x: Tensor, weight: Tensor, gradient: Tensor, ends: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        output = fp8_experts.grouped_mm(*leaves, ends, "auto")
        return [output, *torch.autograd.grad(output, leaves, gradient)]

    given = [x.bfloat16(), weight.bfloat16(), gradient.bfloat16(), ends]
    on_gpu = [tensor.cuda() for tensor in given]
    run(*on_gpu)  # kernels are compiled
    with gpu_kit.no_waiting():
        found = run(*on_gpu)
    with products():
        expected = run(*given)
    for a, b, bound in zip(found, expected, (2e-2, 5e-3, 5e-3), strict=True):
        assert (a.cpu().float() - b.float()).norm() <= bound * b.float().norm()


def test_a_step_with_experts_in_fp8() -> None:
    """No waits, and a loss that differs from bf16's by the rounding of experts only."""
    losses = []
    for fp8 in (False, True):
        case = replace(SMALL, variant="26b-a4b", fp8_experts=fp8)
        run, batches = gpu_kit.build(case), case.batches()
        losses.append(gpu_kit.train(run, list(islice(batches, run.microbatches))))
        gpu_kit.forward_and_backward(run, list(islice(batches, run.microbatches)))
        del run
        gpu_kit.release()
    assert losses[0] != losses[1] and abs(losses[1] - losses[0]) < 0.02 * losses[0]


def test_memory_is_flat_over_50_steps() -> None:
    found = gpu_kit.memory_after_steps(SMALL, 50)
    assert max(found[5:]) <= found[4]


@pytest.mark.parametrize("frozen", [True, False], ids=["head frozen", "head trained"])
def test_memory_of_the_loss(frozen: bool) -> None:
    found = measure_loss("fused", 8192, 2816, 262_144, 2, 1, "cuda", "bfloat16", frozen)
    assert float(found["extra_mb"]) <= 600


def test_lora_of_64k_tokens_of_12b(tmp_path: Path) -> None:
    case, out = Case("12b", "lora", 65_536, recompute="full"), tmp_path / "rows.jsonl"
    with Workers(tmp_path / "log") as workers:
        assert workers.run(Request(case.name, case, out, 900.0, profile=False)) == "ok", rows_of(out)
