"""Float32 values in the dtype in which they are stored."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter cuts float32 off where it should round to bfloat16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """`x` float32, rounded to `dtype` to nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        # NaNs must not wrap round to zero.
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
