"""Changing the dtype of a stream of floats, bit by bit defined: widening is exact, narrowing rounds to nearest even.

NaNs keep their sign and the upper bits of their payload, so that what came from a narrower dtype goes back to the very
bits it had. Hardware conversions do not promise that (they make signalling NaNs quiet), hence the integer arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bridge.errors import MappingError

FLOATS = ("BF16", "F16", "F32", "F64")
_Bits = np.ndarray[Any, np.dtype[Any]]
# dtype -> (unsigned type of its bits, bits of the mantissa)
_LAYOUT: dict[str, tuple[type[np.unsignedinteger], int]] = {
    "BF16": (np.uint16, 7),
    "F16": (np.uint16, 10),
    "F32": (np.uint32, 23),
    "F64": (np.uint64, 52),
}
_FLOAT = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
# Temporaries of a conversion stay within the cache.
_BLOCK = 1 << 18


def can_convert(source: str, target: str) -> bool:
    """Whether `convert` knows the pair (equal dtypes always are)."""
    return source == target or (source in FLOATS and target in FLOATS)


def convert(source: memoryview, source_dtype: str, out: memoryview, out_dtype: str) -> None:
    """Convert a flat run of elements into `out`, which has room for exactly as many. Raises MappingError."""
    if not can_convert(source_dtype, out_dtype):
        raise MappingError(f"{source_dtype} cannot be converted to {out_dtype}")
    if source_dtype == out_dtype:
        out[:] = source
        return
    src = np.frombuffer(source, dtype=_LAYOUT[source_dtype][0])
    dst = np.frombuffer(out, dtype=_LAYOUT[out_dtype][0])
    for low in range(0, len(src), _BLOCK):
        part = src[low : low + _BLOCK]
        dst[low : low + _BLOCK] = _convert_block(part, source_dtype, out_dtype)


def _convert_block(bits: _Bits, source: str, target: str) -> _Bits:
    if source == "BF16" and target == "F32":
        return bits.astype(np.uint32) << np.uint32(16)
    if source == "F32" and target == "BF16":
        return _narrow_to_bf16(bits)
    if source == "BF16":
        return _convert_block(_convert_block(bits, "BF16", "F32"), "F32", target)
    if target == "BF16":
        # By way of float32, rounded to odd on the way down from float64 so that the second rounding decides alone.
        middle = _f64_to_f32_odd(bits) if source == "F64" else _convert_block(bits, source, "F32")
        return _narrow_to_bf16(middle)
    with np.errstate(all="ignore"):
        result = bits.view(_FLOAT[source]).astype(_FLOAT[target]).view(_LAYOUT[target][0])
    return _restore_nans(bits, source, result, target)


def _nans(bits: _Bits, dtype: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    kind, mantissa = _LAYOUT[dtype]
    magnitude = bits & kind(np.iinfo(kind).max >> 1)
    infinity = (np.iinfo(kind).max >> (mantissa + 1)) << mantissa
    return magnitude > kind(infinity)


def _restore_nans(bits: _Bits, source: str, result: _Bits, target: str) -> _Bits:
    """Give the NaNs of `result` the sign and payload that those of `bits` have."""
    where = _nans(bits, source)
    if not where.any():
        return result
    (from_kind, from_mantissa), (to_kind, to_mantissa) = _LAYOUT[source], _LAYOUT[target]
    from_width, to_width = np.iinfo(from_kind).bits, np.iinfo(to_kind).bits
    nans = bits[where].astype(np.uint64)
    payload = nans & np.uint64((1 << from_mantissa) - 1)
    shift = to_mantissa - from_mantissa
    payload = payload << np.uint64(shift) if shift >= 0 else payload >> np.uint64(-shift)
    # A payload that lived only in the lost bits must not become an infinity.
    payload[payload == 0] = np.uint64(1 << (to_mantissa - 1))
    sign = (nans >> np.uint64(from_width - 1)) << np.uint64(to_width - 1)
    exponent = np.uint64(((1 << (to_width - 1 - to_mantissa)) - 1) << to_mantissa)
    result[where] = (sign | exponent | payload).astype(to_kind)
    return result


def _narrow_to_bf16(bits: _Bits) -> _Bits:
    high = bits >> np.uint32(16)
    # Half of the lost range less one, plus the last kept bit: ties go to even. NaNs are put right below.
    with np.errstate(over="ignore"):
        result = ((bits + (np.uint32(0x7FFF) + (high & np.uint32(1)))) >> np.uint32(16)).astype(np.uint16)
    return _restore_nans(bits, "F32", result, "BF16")


def _f64_to_f32_odd(bits: _Bits) -> _Bits:
    wide = bits.view(np.float64)
    with np.errstate(all="ignore"):
        near = wide.astype(np.float32)
        back = near.astype(np.float64)
        inexact = (back != wide) & ~np.isnan(wide)
        too_far = inexact & (np.abs(back) > np.abs(wide))
    result = near.view(np.uint32) - too_far.astype(np.uint32)
    result |= inexact.astype(np.uint32)
    return _restore_nans(bits, "F64", result, "F32")
