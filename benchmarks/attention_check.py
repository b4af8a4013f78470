"""Attention on this device: what the card can do at best, whether the backends are right, and what they take.

Accuracy is held against float32 in blocks, forward and backward, on eight packed documents with images; times are of
one text. Every figure is a line of JSON at once.
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

from benchmarks.attention import describe, measure
from bridge.geometry import Geometry, LayerGeometry
from bridge.megatron.attention_backends import BACKENDS
from bridge.megatron.mask import Mask, mask_of
from bridge.megatron.visibility import mask_rule
from bridge.toy.config import published, toy_config

# Largest relative error of outputs and gradients in bf16.
BOUND = 1e-2
VARIANTS = ("12b", "31b", "e4b")


class Subject(NamedTuple):
    """One layer of a variant."""

    variant: str
    geometry: Geometry
    layer: LayerGeometry

    @property
    def name(self) -> str:
        return f"{self.variant} {self.layer.kind}"


class Sizes(NamedTuple):
    """Which backends, in which dtype, at how many tokens: for accuracy, for time."""

    backends: tuple[str, ...]
    dtype: torch.dtype
    accuracy: int
    time: int

    @staticmethod
    def of(toy: bool) -> Sizes:
        if toy:
            return Sizes(("dense", "blockwise"), torch.float32, 96, 96)
        return Sizes(("flex", "blockwise", "ffpa"), torch.bfloat16, 2304, 8192)


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
    for subject in subjects:
        yield from accuracy(subject, sizes)
    for subject in subjects:
        for name in sizes.backends:
            line = {"what": "time", "layer": subject.name, "backend": name}
            try:
                yield line | measure(subject.layer, subject.geometry, "text", sizes.time, name, 3)
            except Exception:
                yield line | {"traceback": traceback.format_exc()}


def _subjects(toy: bool) -> Iterator[Subject]:
    for variant in VARIANTS:
        geometry = Geometry.from_dict(toy_config(variant).written if toy else published(variant))
        for kind in ("global", "sliding"):
            yield Subject(variant, geometry, next(x for x in geometry.layers if x.kind == kind))


def ceilings() -> Iterator[dict[str, Any]]:
    """Of a GPU, on random numbers: TFLOP/s of a product in bf16, TB/s of a copy, read and written."""
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    yield {"what": "ceiling", "matmul_tflops": 2 * 8192**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9}
    x, y = (torch.empty(1 << 30, dtype=torch.int8, device="cuda") for _ in range(2))
    yield {"what": "ceiling", "copy_tb_s": 2 * x.nbytes / do_bench(lambda: y.copy_(x), return_mode="median") / 1e9}


def accuracy(subject: Subject, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """A line for each backend: the relative errors of output and of the gradients of query, key and value."""
    layer, length = subject.layer, sizes.accuracy
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
    exact = _forward_and_backward("blockwise", given, mask, torch.float32)
    for name in sizes.backends:
        line: dict[str, Any] = {"what": "accuracy", "layer": subject.name, "backend": name}
        try:
            leaf = given[0].clone().requires_grad_()
            if (reason := BACKENDS[name].refuse(leaf, given[1], mask)) is not None:
                yield line | {"skipped": reason}
                continue
            start = time.perf_counter()
            found = _forward_and_backward(name, given, mask, sizes.dtype)
            errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
            # NaN is no error below the bound.
            right = all(error < BOUND for error in errors)
            yield line | {"errors": errors, "ok": right, "first_s": time.perf_counter() - start}
        except Exception:
            yield line | {"ok": False, "traceback": traceback.format_exc()}


def _forward_and_backward(name: str, given: list[Tensor], mask: Mask, dtype: torch.dtype) -> list[Tensor]:
    query, key, value, upstream = (x.detach().clone().to(dtype) for x in given)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = BACKENDS[name].attend(query, key, value, mask)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]
