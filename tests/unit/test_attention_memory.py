"""Memory of attention, forward and backward, as the row grows: linear in tiles, quadratic in one product."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

MEASURE = """
import json, sys, torch
from pathlib import Path
from bridge.megatron.attention_backends import BACKENDS
from bridge.megatron.mask import mask_of
from bridge.megatron.visibility import MaskRule, Visibility

torch.set_num_threads(1)

def peak(name, length, rule):
    visibility = Visibility.of(torch.zeros(1, length, dtype=torch.int64))
    q, k, v = (torch.randn(length, 1, heads, 32, requires_grad=True) for heads in (4, 1, 1))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    status = lambda key: int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
    before = status("VmRSS")
    BACKENDS[name].attend(q, k, v, mask_of(visibility, rule)).sum().backward()
    return (status("VmHWM") - before) / 1024

def both(name, window, lengths):
    rule = MaskRule(window, "causal")
    peak(name, 256, rule)  # what torch itself allocates once
    return [peak(name, length, rule) for length in lengths]

print(json.dumps([both(*case) for case in json.loads(sys.argv[1])]))
"""


def exponents(*cases: tuple[str, int | None, tuple[int, int]]) -> list[float]:
    """For a backend, a window and two lengths, the slope of log(MB) over log(length) from one length to the other."""
    command = [sys.executable, "-c", MEASURE, json.dumps(cases)]
    # No libc heap between large tensors and the kernel: what is freed leaves the process at once.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [
        math.log(last / first) / math.log(long / short)
        for (_, _, (short, long)), (first, last) in zip(cases, json.loads(done.stdout), strict=True)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of the peak is reset through /proc")
def test_memory_grows_linearly_in_tiles_and_quadratically_in_one_product() -> None:
    lengths = (2048, 16384)
    whole, windowed, product = exponents(
        ("blockwise", None, lengths), ("blockwise", 512, lengths), ("reference", None, (1024, 4096))
    )
    assert whole <= 1.15 and windowed <= 1.15
    assert product >= 1.7
