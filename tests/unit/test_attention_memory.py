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

name, window, lengths = json.loads(sys.argv[1])
peak(name, 256, MaskRule(window, "causal"))  # what torch itself allocates once
print(json.dumps([peak(name, length, MaskRule(window, "causal")) for length in lengths]))
"""


def exponent(name: str, window: int | None, lengths: list[int]) -> float:
    """The slope of log(MB) over log(length), from the first length to the last."""
    command = [sys.executable, "-c", MEASURE, json.dumps([name, window, lengths])]
    # No libc heap between large tensors and the kernel: what is freed leaves the process at once.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    megabytes = json.loads(done.stdout)
    return math.log(megabytes[-1] / megabytes[0]) / math.log(lengths[-1] / lengths[0])


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count of the peak is reset through /proc")
def test_memory_grows_linearly_in_tiles_and_quadratically_in_one_product() -> None:
    lengths = [2048, 4096, 8192, 16384]
    assert exponent("blockwise", None, lengths) <= 1.15
    assert exponent("blockwise", 512, lengths) <= 1.15
    assert exponent("reference", None, [1024, 2048, 4096]) >= 1.7
