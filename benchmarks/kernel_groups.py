"""Where the time of a profiled step goes, by groups of kernels.

A kernel belongs to the range of the program that launched it, where that says more than its name (a product may be of
the loss, or of attention in plain torch); else its own name decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

GROUPS = (
    "attention",
    "gemm",
    "grouped gemm",
    "norm and elementwise",
    "loss",
    "optimizer",
    "communication",
    "copies",
    "other",
)

# Of what is around a launch: operators, autograd functions, `record_function` ranges. First match wins.
_RANGES = (
    ("optimizer", r"^optimizer$|Optimizer\.step"),
    ("loss", r"CrossEntropy|cross_entropy|nll_loss|log_softmax|FusedLinear"),
    ("attention", r"_Blockwise|flex_attention|FlexAttention|scaled_dot_product|_ReferenceAttention|ffpa|flash_attn"),
    ("grouped gemm", r"grouped_mm|grouped_gemm|GroupedLinear"),
)
# Of kernels, and on a CPU of operators.
_NAMES = (
    ("communication", r"nccl|c10d::|gloo"),
    ("loss", r"cross_entropy"),
    ("attention", r"flash|fmha|triton_tem|attention|ffpa"),
    ("grouped gemm", r"grouped|group_gemm|GroupProblem|moe_gemm"),
    ("gemm", r"gemm|nvjet|xmma|cutlass|cublas|splitKreduce|aten::(mm|bmm|addmm|baddbmm|linear|matmul|conv)|_mm$|wgmma"),
    ("copies", r"^Mem(cpy|set)|aten::(copy_|_to_copy|contiguous|clone|fill_|zero_)|CatArray|direct_copy"),
    (
        "norm and elementwise",
        r"elementwise|reduce|triton|norm|Norm|gelu|silu|softmax|index|gather|scatter|cumsum|sort|topk|embedding|"
        r"rope|Rope|RoPE|rotary|geglu|scale_rows|sum_experts|quantize|aten::|at::native|vectorized",
    ),
)


def group_of(name: str, ranges: Sequence[str]) -> str:
    """The group of a kernel called `name`, launched within `ranges` (any order)."""
    for group, pattern in _RANGES:
        if any(re.search(pattern, one) for one in ranges):
            return group
    return next((group for group, pattern in _NAMES if re.search(pattern, name)), "other")


def breakdown(profile: Any) -> dict[str, float]:
    """The share of each group in the time that kernels took (on a CPU: operators), of a `torch.profiler.profile`."""
    events = list(profile.events())
    on_gpu = any(event.kernels for event in events)
    # Ranges of the program are listed among their kernels, with their time again. Operators are not, though Inductor
    # launches each of its kernels within one of the same name.
    annotations = {event.name for event in events if event.is_user_annotation}
    times: Counter[str] = Counter()
    for event in events:
        ranges = list(_around(event))
        if not on_gpu:
            times[group_of(event.name, ranges)] += event.self_cpu_time_total
        for kernel in event.kernels:
            if kernel.name not in annotations:
                times[group_of(kernel.name, ranges)] += kernel.duration
    total = sum(times.values()) or 1
    return {group: round(times[group] / total, 4) for group in GROUPS if times[group]}


def _around(event: Any) -> Iterator[str]:
    while event is not None:
        yield event.name
        event = event.cpu_parent


def transfers_to_host(profile: Any) -> dict[str, int]:
    """How often the host waited for the device, by what it waited with: what a profile shows of host syncs."""
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "aten::item")
    names = Counter(event.name for event in profile.events())
    return {wait: sum(count for name, count in names.items() if wait in name) for wait in waits}
