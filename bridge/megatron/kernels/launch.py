"""What the launches of all kernels have in common."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# Elements that a program holds at a time: 16 a thread with 4 warps.
TILE = 2048


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., n] as [rows, n] with neighbouring elements in a row; a view where strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def num_warps(elements: int) -> int:
    """For a program that holds so many elements (a power of 2) at a time."""
    return min(max(elements // 512, 4), 16)


def num_programs(x: Tensor, pieces: int) -> int:
    """Of a kernel whose programs each sum over many of `pieces`: what fills the device. On a CPU, enough to test it."""
    if not x.is_cuda:
        return min(pieces, 3)
    return min(pieces, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count)


def power_of_2(n: int) -> int:
    """The smallest that is not below `n`."""
    return triton.next_power_of_2(n)


def row_tile(rows: Tensor) -> dict[str, int]:
    """N, ROWS, COLUMNS and warps of a kernel that holds whole `rows` [t, n], as many of them as make a tile."""
    columns = power_of_2(rows.shape[1])
    height = max(1, min(TILE // columns, power_of_2(len(rows))))
    return {"N": rows.shape[1], "ROWS": height, "COLUMNS": columns, "num_warps": num_warps(height * columns)}
