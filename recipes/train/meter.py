"""Rates of a run: tokens and FLOPs a second, the part of the hardware's peak, the part of the batches that is real."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense bf16 TFLOP/s of a GPU by what its name contains, from the makers' data sheets; the first that fits counts.
_PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("H800", 989.0),
    ("GH200", 989.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
)


def peak_flops(configured: float) -> float | None:
    """FLOP/s of one device at best: `configured` (TFLOP/s) where it is set, else by the GPU's name; None: not known."""
    if configured:
        return configured * 1e12
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak * 1e12 for part, peak in _PEAKS if part in name), None)


def peak_memory() -> float:
    """Bytes: the most that was allocated on this rank's GPU, or resident in this process."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Meter:
    """Counts what was done between two readings. `peak`: FLOP/s of one of `devices`, None where it is not known."""

    def __init__(self, peak: float | None, devices: int) -> None:
        self._peak, self._devices = peak, devices
        self._restart()

    def _restart(self) -> None:
        self._start, self._real, self._slots, self._flops = time.perf_counter(), 0.0, 0.0, 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done in the block is no training: its time does not count."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begun

    def add(self, real: float, slots: float, flops: float) -> None:
        """A step of all ranks: its real tokens, all tokens that were computed, and FLOPs that were needed."""
        self._real, self._slots, self._flops = self._real + real, self._slots + slots, self._flops + flops

    def read(self) -> dict[str, float]:
        """Since the last reading: tokens/s, TFLOP/s of one device, MFU, and the part of the tokens that was real."""
        seconds = time.perf_counter() - self._start
        rate = self._flops / seconds / self._devices
        values = {
            "tokens_per_s": self._real / seconds,
            "tflops_per_device": rate / 1e12,
            "data_efficiency": self._real / self._slots if self._slots else 0.0,
        }
        if self._peak:
            values["mfu"] = rate / self._peak
        self._restart()
        return values
