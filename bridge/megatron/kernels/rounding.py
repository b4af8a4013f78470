"""Float32 values in the dtype in which they are stored, and products of such."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter cuts float32 off where it should round to bfloat16, and where a number of E4M3 is rounded up to a
# power of 2 loses the carry.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """`x` float32, rounded to `dtype` to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        # NaNs must not wrap round to zero.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    if _INTERPRETED and dtype == tl.float8e4nv:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        # Below 2^-6 the numbers lie 2^-9 apart: so do float32's from 2^14 on.
        small = (x + 24576.0) - 24576.0
        rounded = tl.where(tl.abs(x) < 0.015625, small, bits.to(tl.float32, bitcast=True))
        # The NaN of E4M3 has all bits set.
        x = tl.where(x == x, rounded, (bits | 0x7FF00000).to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor) -> tl.tensor:
    """`total` float32 + a b; operands of one dtype, exact in float32. The interpreter has no product of bfloat16."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
