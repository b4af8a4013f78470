"""Copies in host memory for checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from recipes.train.host_memory import copy_of, on_its_own

BASE = torch.arange(3 << 20, dtype=torch.float32).view(3 << 10, 1 << 10)


TENSORS = pytest.mark.parametrize(
    "tensor",
    [BASE, BASE[1:], BASE[:, :900], BASE.t(), BASE.bfloat16(), BASE[:3], torch.tensor(1.5), BASE[:0]],
    ids=["whole", "rows", "columns", "turned", "bf16", "small", "number", "empty"],
)


@TENSORS
def test_a_copy_is_what_clone_makes(tensor: Tensor) -> None:
    """And has no more memory than it needs: Megatron would copy it once more."""
    copy, clone = copy_of(tensor), tensor.clone()
    assert torch.equal(copy, clone) and (copy.dtype, copy.stride()) == (clone.dtype, clone.stride())
    assert copy.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr() or not tensor.numel()


@TENSORS
def test_a_part_stands_on_its_own(tensor: Tensor) -> None:
    part = on_its_own(tensor)
    assert torch.equal(part, tensor) and part.dtype is tensor.dtype
    assert part.untyped_storage().nbytes() == tensor.nbytes
    assert part.data_ptr() == tensor.data_ptr() or not tensor.numel() or not tensor.is_contiguous()
