"""The sum over a token's experts, of their outputs or of its copies' gradients (see `bridge.megatron.local_dispatch`).

Every token goes to the same number of experts, so that its rows are read where they are: they are not gathered first,
and nothing is added atomically. The sum is float32 and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bridge.megatron.kernels.launch import as_rows, power_of_2
from bridge.megatron.kernels.rounding import round_to

_BLOCK = 1024


@triton.jit
def sum_experts_kernel(
    source: tl.tensor,
    places: tl.tensor,
    output: tl.tensor,
    n: tl.tensor,
    source_stride: tl.tensor,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK columns of one token: the float32 sum of its COPIES rows [n] of `source`, at `places` [tokens * COPIES]."""
    blocks = tl.cdiv(n, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for copy in tl.static_range(COPIES):
        place = tl.load(places + token * COPIES + copy)
        total += tl.load(source + place * source_stride + column, column < n, other=0.0).to(tl.float32)
    tl.store(output + token * n + column, round_to(total, output.dtype.element_ty), column < n)


def combine(rows: Tensor, places: Tensor, copies: int) -> Tensor:
    """`rows` [t * copies, n] -> [t, n]: of each token the sum of its rows, those at `places` [t * copies] int64."""
    rows, n = as_rows(rows), rows.shape[1]
    tokens = len(places) // copies
    output = torch.empty(tokens, n, dtype=rows.dtype, device=rows.device)
    if output.numel():
        block = min(_BLOCK, power_of_2(n))
        with torch.cuda.device_of(rows):
            sum_experts_kernel[(tokens * triton.cdiv(n, block),)](
                rows, places, output, n, rows.stride(0), COPIES=copies, BLOCK=block, num_warps=4
            )
    return output
