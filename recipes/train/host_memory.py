"""Copies of tensors in host memory that is quick to fill.

A system hands out new memory page by page, as it is first written to: of pages of 4 kB that takes about as long as the
copy itself. Large pages are a five-hundredth as many.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_LARGE_PAGE = 2 << 20


def empty(count: int, dtype: torch.dtype) -> Tensor:
    """[count], not initialised, in large pages where the system has them; freed with the tensor."""
    size = count * dtype.itemsize
    if size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype)
    block = mmap.mmap(-1, size)
    block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=dtype)


def on_its_own(tensor: Tensor) -> Tensor:
    """The same numbers in the same place, as a tensor that has no more memory than it needs; a copy where they
    do not lie one behind the other."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if not tensor.is_contiguous() or not tensor.numel():
        return copy_of(tensor)
    return torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy()).view(tensor.dtype).view(tensor.shape)


def room_for(tensor: Tensor) -> Tensor:
    """Memory for a copy, not initialised, with the strides that `clone` gives."""
    strides = torch.empty_like(tensor, device="meta").stride()
    return empty(tensor.numel(), tensor.dtype).as_strided(tensor.shape, strides)


def copy_of(tensor: Tensor) -> Tensor:
    """A copy with the strides that `clone` gives; of a GPU's tensor in pinned memory, there when it is waited for."""
    return tensor.to("cpu", non_blocking=True) if tensor.is_cuda else room_for(tensor).copy_(tensor)
