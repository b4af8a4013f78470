"""The process of one case: it imports what it may need, says so, waits for its case, and writes a line for each phase.

`benchmarks.workers` starts it, ahead of time: the imports take longer than many a case. It ends with what it started
when whoever started it does, however that ends: its standard input is open for as long.
"""

from __future__ import annotations

import faulthandler
import math
import os
import platform
import queue
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from benchmarks.case import Case
from benchmarks.lines import MEMORY, append
from benchmarks.loss import measure as measure_loss
from benchmarks.step_profile import profiled
from benchmarks.training_sides import Step, step_of
from benchmarks.workers import Request
from recipes.train.meter import peak_flops, peak_memory

WARM, MEASURED = 3, 5
# Seconds that a profile takes beside its step, and everything else at the end.
_PROFILE_SECONDS, _END_SECONDS = 12.0, 2.0
# How long before its end a case that hangs says where.
_TRACE_SECONDS = 8.0
_PACKAGES = ("torch", "megatron-core", "transformers", "peft", "liger-kernel", "transformer-engine", "triton")
# A phase and what is said of it.
Say = Callable[..., None]


def environment() -> dict[str, str]:
    """What the figures depend on."""
    found = {"device": platform.machine(), "date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        found["cuda"] = str(torch.version.cuda)
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def run(request: Request) -> None:
    """Measure a case in this process, a line for each phase; what goes wrong is the last one, with its traceback."""
    start = time.monotonic()

    def say(phase: str, **values: Any) -> None:
        append(request.out, request.name, phase, at=round(time.monotonic() - start, 2), **values)

    say("start", **asdict(request.case), **environment())
    try:
        measure(request.case, say, start + request.seconds, request.profile)
    except Exception as error:
        # Libraries of kernels raise their own, and cuBLAS asks for its workspace itself.
        full = isinstance(error, torch.OutOfMemoryError)
        full |= any(said in str(error).lower() for said in ("out of memory", "alloc_failed"))
        text = f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
        say("failed", status=MEMORY if full else text, traceback=traceback.format_exc(), peak_gb=peak_memory() / 1e9)


def measure(case: Case, say: Say, until: float = math.inf, profile: bool = True) -> None:
    """Say every phase of a case. `until`, on the monotonic clock, is when it has to be over."""
    on_gpu = torch.cuda.is_available()
    if case.mode == "loss":
        geometry, frozen = case.model.geometry, case.side == "head frozen"
        shape = (case.length, geometry.hidden_size, geometry.vocab_size)
        found = measure_loss("fused", *shape, 2, 3, "cuda" if on_gpu else "cpu", case.dtype, frozen)
        say("measured", status="ok", seconds=found["seconds"], peak_gb=float(found["extra_mb"]) / 1e3)
        return
    torch.manual_seed(0)
    sync: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    flops = case.flops()
    step = step_of(case)
    sync()
    say("built", held_gb=torch.cuda.memory_allocated() / 1e9 if on_gpu else None)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    warm, measured = (WARM, MEASURED) if case.size == "published" else (1, 1)
    times = _timed(step, sync, say, warm + measured, until, profile)
    if len(times) < 2:
        say("failed", status=f"failed: only one step, which compiles, fitted its time: {times[0]:.1f} s")
        return
    # A pause of the host, or a kernel compiled late, is not the rate.
    kept = times[min(warm, len(times) // 2) :]
    seconds, best = statistics.median(kept), peak_flops(0.0)
    say(
        "measured",
        status="ok",
        seconds=seconds,
        steps=len(times),
        of=len(kept),
        tokens_per_s=case.microbatches * case.length / seconds,
        tflops=flops / seconds / 1e12,
        mfu=flops / seconds / best if best else None,
        peak_gb=peak_memory() / 1e9,
        reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None,
    )
    if profile and time.monotonic() + 2 * times[-1] < until:

        def once() -> None:
            step()
            sync()

        for phase, values in profiled(once):
            say(phase, **values)


def _timed(step: Step, sync: Callable[[], None], say: Say, most: int, until: float, profile: bool) -> list[float]:
    """Seconds of each step: one, and as many more, up to `most`, as fit with the profile behind them."""
    times: list[float] = []
    while not times or (len(times) < most and time.monotonic() + _needed(times, profile) < until):
        start = time.perf_counter()
        loss = step()
        sync()
        times.append(time.perf_counter() - start)
        say("step", seconds=times[-1], loss=loss)
    return times


def _needed(times: list[float], profile: bool) -> float:
    """Seconds from here to the end of a case, with one more step. The first one, which compiles, foretells little."""
    step = times[-1] if len(times) > 1 else times[0] / 8
    return 1.3 * step + (2.5 * step + _PROFILE_SECONDS if profile else _END_SECONDS)


def _wait_for_request() -> str:
    """The first line of standard input. When that is closed, this process ends, with all of its group."""
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        if os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    _import_the_rest()
    print("ready", flush=True)
    # What libraries print belongs to the log.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return lines.get()


def _import_the_rest() -> None:
    """What the cases import once they run."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    import recipes.config
    import recipes.train.loop
    import recipes.train.setup  # noqa: F401


def main() -> None:
    """Measure the case that standard input names."""
    faulthandler.enable()
    request = Request.from_json(_wait_for_request())
    faulthandler.dump_traceback_later(max(_TRACE_SECONDS, request.seconds - _TRACE_SECONDS), file=sys.stderr)
    run(request)
    # Neither models nor groups are taken apart: the next case waits for the device.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
