"""What a profile is summed to, of events as torch's profiler gives them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch.autograd import DeviceType

from benchmarks.step_profile import summary


def event(name: str, start: int, duration: int, device: DeviceType = DeviceType.CUDA, annotation: bool = False) -> Any:
    said = {"name": name, "start_ns": start, "duration_ns": duration, "device_type": device}
    said |= {"is_user_annotation": annotation}
    return SimpleNamespace(**{key: lambda value=value: value for key, value in said.items()})


def test_what_a_profile_is_summed_to() -> None:
    ms, cpu = 1_000_000, DeviceType.CPU
    found = summary(
        [
            event("aten::mm", 0, 9 * ms, cpu),
            event("cudaLaunchKernel", 1 * ms, 1 * ms, cpu),
            event("cudaStreamSynchronize", 2 * ms, 5 * ms, cpu),
            event("optimizer", 0, 99 * ms, cpu, annotation=True),
            event("optimizer", 0, 99 * ms, annotation=True),  # a range, timed on the device too
            event(
                "triton_tem_fused_flex_attention_0", 20 * ms, 1 * ms, cpu
            ),  # an operator, with the name of its kernel
            event("triton_tem_fused_flex_attention_0", 20 * ms, 2 * ms),
            event("nvjet", 10 * ms, 4 * ms),
            event("nvjet", 30 * ms, 1 * ms),
            event("a" * 500, 12 * ms, 4 * ms),  # beside the first
        ]
    )
    assert found["busy_ms"] == 9.0
    assert found["kernels"] == [(5.0, 2, "nvjet"), (4.0, 1, "a" * 500), (2.0, 1, "triton_tem_fused_flex_attention_0")]
    assert found["host"] == [(5.0, 1, "cudaStreamSynchronize"), (1.0, 1, "cudaLaunchKernel")]
