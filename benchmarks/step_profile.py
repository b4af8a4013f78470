"""One profiled step: kernels by time, how long the device was busy, what the host waited for, and groups of kernels."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks.kernel_groups import breakdown, transfers_to_host
from benchmarks.lines import Row

_MOST_KERNELS = 40
# Calls of the host: those in which it waits for the device, and launches.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_LAUNCHES = ("cudaLaunch", "cuLaunch")


def profiled(run: Callable[[], None]) -> Iterator[tuple[str, Row]]:
    """Phases `profile` and `groups` of one more step. What was measured before stands, whatever becomes of this.

    They come apart: torch's own tree of events, which the groups need, may take longer than the step.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        with torch.profiler.profile(activities=activities) as profile:
            start = time.perf_counter()
            run()
            wall = time.perf_counter() - start
        yield "profile", {"wall_ms": wall * 1e3, **summary(profile.profiler.kineto_results.events())}
        yield "groups", {"breakdown": breakdown(profile), "waits": transfers_to_host(profile)}
    except Exception:
        yield "profile", {"not_profiled": traceback.format_exc()}


def summary(events: Iterable[Any]) -> Row:
    """Of the profiler's raw events: `kernels`, the longest as [ms, how often, name]; `busy_ms`, the union of all of
    them; `host`, calls that launch or wait as [ms, how often, name]. On a CPU there are none of these."""
    host: list[Any] = []
    device: list[Any] = []
    for event in events:
        (device if event.device_type() == DeviceType.CUDA else host).append(event)
    # A range of the program is listed beside its kernels too, with their time again. Its name alone does not tell:
    # Inductor launches each of its kernels within an operator of the same name.
    kernels = [event for event in device if not event.is_user_annotation()]
    calls = [event for event in host if event.name().startswith((*_WAITS, *_LAUNCHES))]
    busy = until = 0
    for start, stop in sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in kernels):
        busy, until = busy + max(0, stop - max(start, until)), max(until, stop)
    return {"busy_ms": busy / 1e6, "kernels": _longest(kernels), "host": _longest(calls)}


def _longest(events: Iterable[Any]) -> list[tuple[float, int, str]]:
    spent: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for event in events:
        spent[event.name()] += event.duration_ns()
        count[event.name()] += 1
    return [(round(ns / 1e6, 3), count[name], name) for name, ns in spent.most_common(_MOST_KERNELS)]
