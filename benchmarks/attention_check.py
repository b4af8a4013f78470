"""Attention on this device: what the card can do at best, whether the backends are right, and what they take.

Accuracy is held against float32 in blocks, forward and backward, on eight packed documents with images; times are of
one text, at the same length: FlexAttention compiles once for both. Every figure is a line of JSON at once.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.attention import FLEX_CHECKED, attention, describe, measure, refusal
from bridge.geometry import Geometry, LayerGeometry
from bridge.megatron.mask import Mask, mask_of
from bridge.megatron.visibility import mask_rule
from bridge.toy.config import published, toy_config

# Largest relative error of outputs and gradients in bf16.
BOUND = 1e-2
LAYERS = (
    ("12b", "global"),
    ("12b", "sliding"),
    ("31b", "global"),
    ("31b", "sliding"),
    ("e4b", "global"),
    ("e4b", "sliding"),
)


class Subject(NamedTuple):
    """One layer of a variant."""

    variant: str
    geometry: Geometry
    layer: LayerGeometry

    @property
    def name(self) -> str:
        return f"{self.variant} {self.layer.kind}"


class Sizes(NamedTuple):
    """Which backends, those of the first round for all layers first, in which dtype, at how many tokens."""

    rounds: tuple[tuple[str, ...], ...]
    dtype: torch.dtype
    length: int

    @staticmethod
    def of(toy: bool) -> Sizes:
        if toy:
            return Sizes((("dense", "blockwise", "flex_triton"),), torch.float32, 96)
        rounds = (("flex", "flex_triton", FLEX_CHECKED), ("blockwise", "ffpa"))
        return Sizes(rounds, torch.bfloat16, 8192)


def check(out: Path, seconds: float, toy: bool = False) -> bool:
    """Add the lines to `out`, most important first, until `seconds` are over; whether all that was checked is right.

    `toy`: toys in float32, on any device.
    """
    end, sizes = time.monotonic() + seconds, Sizes.of(toy)
    right = True
    for line in _lines(sizes, toy):
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line)[:400], flush=True)
        right &= line.get("ok", True)
        if time.monotonic() > end:
            break
    return right


def _lines(sizes: Sizes, toy: bool) -> Iterator[dict[str, Any]]:
    if torch.cuda.is_available():
        yield from ceilings()
    subjects = list(_subjects(toy))
    for names in sizes.rounds:
        for subject in subjects:
            # Or sizes of the layer before would be unknowns of this one's kernel.
            torch._dynamo.reset()
            for name in names:
                yield accuracy(subject, sizes, name)
                line = {"what": "time", "layer": subject.name, "backend": name}
                try:
                    yield line | measure(subject.layer, subject.geometry, "text", sizes.length, name, 3)
                except Exception:
                    yield line | {"traceback": traceback.format_exc()}


def _subjects(toy: bool) -> Iterator[Subject]:
    for variant, kind in LAYERS:
        geometry = Geometry.from_dict(toy_config(variant).written if toy else published(variant))
        yield Subject(variant, geometry, next(x for x in geometry.layers if x.kind == kind))


def ceilings() -> Iterator[dict[str, Any]]:
    """Of a GPU, on random numbers: TFLOP/s of a product in bf16, TB/s of a copy, read and written."""
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    yield {"what": "ceiling", "matmul_tflops": 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9}
    x, y = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    yield {"what": "ceiling", "copy_tb_s": 2 * x.nbytes / do_bench(lambda: y.copy_(x), return_mode="median") / 1e9}


def accuracy(subject: Subject, sizes: Sizes, name: str) -> dict[str, Any]:
    """The line of a backend: the relative errors of output and of the gradients of query, key and value."""
    layer, length = subject.layer, sizes.length
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = mask_of(describe("packed", length, device), mask_rule(subject.geometry, layer))
    torch.manual_seed(0)
    heads = (layer.num_attention_heads, layer.num_query_groups, layer.num_query_groups)
    query, key, value, upstream = (
        torch.randn(length, 1, n, layer.head_dim, device=device) for n in (*heads, layer.num_attention_heads)
    )
    query *= layer.head_dim**-0.5
    # The exact result is of the rounded numbers.
    given = [x.to(sizes.dtype) for x in (query, key, value, upstream)]
    line: dict[str, Any] = {"what": "accuracy", "layer": subject.name, "backend": name}
    try:
        if (reason := refusal(name, given[0].clone().requires_grad_(), given[1], mask)) is not None:
            return line | {"skipped": reason}
        exact = _forward_and_backward("blockwise", given, mask, torch.float32)
        start = time.perf_counter()
        found = _forward_and_backward(name, given, mask, sizes.dtype)
        errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        # NaN is no error below the bound.
        right = all(error < BOUND for error in errors)
        return line | {"errors": errors, "ok": right, "first_s": time.perf_counter() - start}
    except Exception:
        return line | {"ok": False, "traceback": traceback.format_exc()}


def _forward_and_backward(name: str, given: list[Tensor], mask: Mask, dtype: torch.dtype) -> list[Tensor]:
    query, key, value, upstream = (x.detach().clone().to(dtype) for x in given)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = attention(name)(query, key, value, mask)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
