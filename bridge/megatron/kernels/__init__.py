"""Fused kernels of this project, in Triton: passes over memory that torch makes in several are made in one.

Each module has the kernels of one operation and the autograd function around them; the definition of the operation, in
torch, is where the model calls it, and decides by `fused` who computes. The kernels round to the dtype of their tensors
where that definition does, so that it makes no difference beyond the order of sums. Only CUDA tensors are given to
them, except by "triton", which under `TRITON_INTERPRET=1` runs them on a CPU: that is how they are tested.

Triton is imported by the modules of the operations, and only when one of them is used.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

# What `Gemma4TransformerConfig.kernels` may be: "auto" is Triton for CUDA tensors where it is installed.
NAMES = ("auto", "torch", "triton")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def fused(kernels: str, x: Tensor) -> bool:
    """Whether a kernel of this package computes what is done to `x`; torch does where it does not."""
    if kernels == "torch" or x.dtype not in _DTYPES:
        return False
    return kernels == "triton" or (x.is_cuda and installed())


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on a CPU (`TRITON_INTERPRET=1`); Triton is installed."""
    import triton

    return bool(triton.knobs.runtime.interpret)
