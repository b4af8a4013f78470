"""CRC32 of bytes that come in runs: out of the CRC32 of each."""

from __future__ import annotations

from functools import lru_cache

_POLY = 0xEDB88320


def _multiply(a: int, b: int) -> int:
    """a * b modulo the CRC32 polynomial, bits reflected."""
    product, bit = 0, 1 << 31
    while True:
        if a & bit:
            product ^= b
            if not a & (bit - 1):
                return product
        bit >>= 1
        b = (b >> 1) ^ (_POLY if b & 1 else 0)


@lru_cache(maxsize=4096)
def _power(nbytes: int) -> int:
    """x^(8 * nbytes) modulo the polynomial."""
    result, square, bits = 1 << 31, 1 << 30, 8 * nbytes
    while bits:
        if bits & 1:
            result = _multiply(square, result)
        square, bits = _multiply(square, square), bits >> 1
    return result


def combine_crc32(first: int, second: int, second_bytes: int) -> int:
    """The CRC32 of two runs of bytes behind each other, from theirs and the length of the second."""
    return (_multiply(_power(second_bytes), first) if first else 0) ^ second
