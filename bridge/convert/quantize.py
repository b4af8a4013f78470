"""Rounding weights to nearest with scales of their largest values, as llm-compressor does it without data.

Scales and quotients are made in float32 and rounded to the dtype of the weight, in which torch computes there.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from bridge.convert.dequantize import E4M3, Bytes, Floats
from bridge.convert.dtypes import convert

# dtype -> the scale of a block of zeros: the distance from 1 to the next number, as there
EPSILON = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23}
_TINY = {"BF16": 2.0**-126, "F16": 2.0**-14, "F32": 2.0**-126}
_E4M3_MAX, _E2M1_MAX = 448.0, 6.0
# The scale of a group of zeros, beside a global scale.
_E4M3_EPSILON = np.float32(0.125)
# half the range of the codes: what the largest value of a block becomes
HALF_RANGE = {"F8_E4M3": _E4M3_MAX, "int4": 7.5, "e2m1": _E2M1_MAX}


def rounded(values: Floats, dtype: str) -> Floats:
    """`values` as `dtype` has them, in float32."""
    if dtype == "F32":
        return values
    if dtype == "BF16":
        return (_bf16(values).astype(np.uint32) << np.uint32(16)).view(np.float32)
    values = np.ascontiguousarray(values)
    half = memoryview(np.empty(values.size * 2, dtype=np.uint8))
    out = np.empty_like(values)
    convert(memoryview(values).cast("B"), "F32", half, dtype)
    convert(half, dtype, memoryview(out).cast("B"), "F32")
    return out


def _bf16(values: Floats) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """The bits of the nearest of bfloat16, ties to even; of numbers alone, so that there is no NaN to look for."""
    bits = values.view(np.uint32)
    # Half of the lost range less one, plus the last kept bit.
    nearest = bits >> np.uint32(16)
    nearest &= np.uint32(1)
    nearest += np.uint32(0x7FFF)
    nearest += bits
    nearest >>= np.uint32(16)
    return nearest.astype(np.uint16)


def encode_e4m3(values: Floats) -> Bytes:
    """To the nearest of E4M3, ties to even, within ±448."""
    size = np.minimum(np.abs(values), np.float32(_E4M3_MAX))
    bits = size.view(np.uint32)
    normal = ((bits + (np.uint32(0x7FFFF) + ((bits >> np.uint32(20)) & np.uint32(1)))) >> np.uint32(20)) - np.uint32(
        120 << 3
    )
    # Below 2^-6 the step is 2^-9, whatever the exponent.
    code = np.where(size < 2.0**-6, np.rint(size * np.float32(512)).astype(np.uint32), normal).astype(np.uint8)
    return code | (np.signbit(values).astype(np.uint8) << np.uint8(7))


def _encode_e2m1(values: Floats) -> Bytes:
    """To the nearest of E2M1, ties to even."""
    size = np.abs(values)
    code = np.zeros(values.shape, dtype=np.uint8)
    for bound, included in ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True)):
        code += size >= bound if included else size > bound
    code += size > 5.0
    # A zero has no sign, a number that became zero keeps its own.
    return code | ((values < 0).astype(np.uint8) << np.uint8(3))


def scales(largest: Floats, kind: str, dtype: str) -> Floats:
    """The scale of each block, of the largest absolute value in it; float32 that `dtype` has. No global scale."""
    scale = rounded(largest / np.float32(HALF_RANGE[kind]), dtype)
    return np.where(scale == 0, np.float32(EPSILON[dtype]), scale)


def global_scale(largest: np.float32, dtype: str) -> np.float32:
    """What takes scales of groups into the range of E4M3, of the largest absolute value of a tensor."""
    with np.errstate(over="ignore"):
        size = np.maximum(largest, np.float32(_TINY[dtype]))
        # A number divided by a tensor is, in torch, that number times the reciprocal: rounded twice.
        reciprocal = rounded(np.array([np.float32(1) / size], dtype=np.float32), dtype)
        scale = rounded(reciprocal * np.float32(_E4M3_MAX * _E2M1_MAX), dtype)[0]
    return scale if np.isfinite(scale) else np.float32(1)


def group_scales(largest: Floats, overall: np.float32, dtype: str) -> Bytes:
    """Scales of groups beside a global one, as E4M3 codes."""
    scale = overall * rounded(largest / np.float32(_E2M1_MAX), dtype)
    code = encode_e4m3(scale)
    return np.where(E4M3.take(code) == 0, encode_e4m3(np.array([_E4M3_EPSILON]))[0], code)


def encode(values: Floats, scale: Floats, kind: str, dtype: str) -> Bytes:
    """Weights [rows, columns] as packed codes [rows, bytes]; `scale` [rows, groups]."""
    columns = values.shape[1]
    quotient = values / (scale if scale.shape[1] == 1 else np.repeat(scale, columns // scale.shape[1], axis=1))
    if kind == "e2m1":
        return _packed(_encode_e2m1(quotient))
    # Of the few numbers of bfloat16 each one's code is known: one look instead of twenty operations.
    codes = _codes(kind).take(_bf16(quotient)) if dtype == "BF16" else _nearest(rounded(quotient, dtype), kind)
    if kind == "F8_E4M3":
        return codes
    return _packed(np.pad(codes, ((0, 0), (0, -columns % 8)), constant_values=0) if columns % 8 else codes)


def _nearest(values: Floats, kind: str) -> Bytes:
    if kind == "F8_E4M3":
        return encode_e4m3(values)
    return (np.rint(np.clip(values, -8, 7)).astype(np.int8) + np.int8(8)).view(np.uint8)


@cache
def _codes(kind: str) -> Bytes:
    """The code of each number of bfloat16, by its bits."""
    every = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    return _nearest(np.nan_to_num(every, posinf=HALF_RANGE["F8_E4M3"], neginf=-HALF_RANGE["F8_E4M3"]), kind)


def _packed(codes: Bytes) -> Bytes:
    """Four-bit codes, two in a byte, the first in the lower half."""
    pairs = np.ascontiguousarray(codes).view(np.uint16)
    return (pairs | (pairs >> np.uint16(4))).astype(np.uint8)
