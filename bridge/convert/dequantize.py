"""The arithmetic of quantized weights: codes and scales of some rows -> values, rounded as compressed-tensors does.

A product is made in float32 and rounded once to the dtype that the scheme computes in; torch does the same with 16-bit
operands. Codes, zero points and what is left of their difference are exact in each of those dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bridge.convert.dtypes import convert

Floats = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def _e4m3() -> Floats:
    """The value of each byte: a sign, four bits of an exponent with bias 7, three of a mantissa; no infinities."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7).astype(np.float64)
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


def _pairs(values: Floats) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The two values of each byte, the lower four bits first, side by side in eight bytes."""
    code = np.arange(256)
    both = np.stack([values[code & 15], values[code >> 4]], axis=1)
    return np.ascontiguousarray(both).view(np.uint64).ravel()


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
E4M3 = _e4m3()
# kind of codes -> what a byte of them stands for: one value, or two as one word
_TABLES: dict[str, np.ndarray[Any, Any]] = {
    "F8_E4M3": E4M3,
    "I8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "int8": np.arange(256, dtype=np.float32) - 128,
    "int4": _pairs(np.arange(16, dtype=np.float32) - 8),
    "e2m1": _pairs(np.concatenate([_E2M1, -_E2M1])),
}
# kind of codes -> bits of one, and the dtype and bytes of the words that they are stored in
STORED = {
    "F8_E4M3": (8, "F8_E4M3", 1),
    "I8": (8, "I8", 1),
    "int8": (8, "I32", 4),
    "int4": (4, "I32", 4),
    "e2m1": (4, "U8", 1),
}


def words(kind: str, count: int) -> int:
    """How many words of the stored dtype hold `count` codes of one row."""
    bits, _, nbytes = STORED[kind]
    return -(-count * bits // (8 * nbytes))


def decode(kind: str, codes: Bytes, count: int) -> Floats:
    """Codes [rows, bytes] as float32 [rows, count]: a new array, or a view of one with padding behind each row."""
    return _TABLES[kind].take(codes).view(np.float32)[:, :count]


def decode_rows(kind: str, codes: Bytes, first: int, count: int) -> Floats:
    """Codes that are packed along the rows into words [words, columns x 4 bytes]: rows [first, first + count) of them.

    Row `first` counts from the first row of the first word. Zero points are stored so.
    """
    per_word = 32 // STORED[kind][0]
    by_column = np.ascontiguousarray(codes.view(np.uint32).T)
    values = decode(kind, by_column.view(np.uint8), len(codes) * per_word)
    return np.ascontiguousarray(values[:, first : first + count].T)


def apply(
    operation: Callable[..., Any], values: Floats, grid: Floats, width: int | None, height: int | None, first: int
) -> None:
    """values = operation(values, its block's entry of `grid`), in place.

    `values` [rows, columns] begin at row `first` of the tensor; `grid` has one row for each `height` of them (None: one
    for all), from that of `first` on, and one column for each `width` columns.
    """
    rows, columns = values.shape
    if height is not None and height > 1:
        grid = np.repeat(grid, height, axis=0)[first % height : first % height + rows]
    if width is None or grid.shape[1] == 1:
        operation(values, grid, out=values)
    elif columns % width == 0 and values.flags.c_contiguous:
        blocks = values.reshape(rows, -1, width)
        operation(blocks, grid[:, :, None], out=blocks)
    else:
        operation(values, np.repeat(grid, width, axis=1)[:, :columns], out=values)


def to_float(data: Bytes, dtype: str, shape: tuple[int, ...]) -> Floats:
    """Stored scales of `dtype` as float32."""
    if dtype == "F8_E4M3":
        return E4M3.take(data).reshape(shape)
    out = np.empty(shape, dtype=np.float32)
    convert(memoryview(data).cast("B"), dtype, memoryview(out).cast("B"), "F32")
    return out
