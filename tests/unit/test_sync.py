"""Buckets: bounded, aligned, whole Megatron tensors; and which tensors an engine loads together."""

from __future__ import annotations

import pytest
import torch

from bridge.sync.buckets import Group, SyncTensor, plan_buckets, with_siblings


def group(key: str, *names: str, size: int = 8, dtype: torch.dtype = torch.float32) -> Group:
    return tuple(SyncTensor(name, key, dtype, (size,)) for name in names)


def test_buckets_are_bounded_and_keep_groups_whole() -> None:
    """32 bytes a tensor: q, k, v are 96, and what does not fit beside others begins a bucket, or is one."""
    groups = [group("qkv", "q", "k", "v"), group("o", "o"), group("norm", "norm"), group("table", "table", size=100)]
    buckets = plan_buckets(groups, 128)
    assert [[t.name for t in bucket.tensors] for bucket in buckets] == [["q", "k", "v", "o"], ["norm"], ["table"]]
    assert [bucket.nbytes for bucket in buckets] == [128, 32, 400]
    assert plan_buckets([], 128) == ()


def test_views_are_aligned_whatever_the_dtypes() -> None:
    """Bytes, halves and floats in one buffer, and a tensor without axes: nothing overlaps, nothing is left between."""
    groups = [
        (SyncTensor("byte", "a", torch.uint8, (3,)),),
        (SyncTensor("half", "b", torch.bfloat16, (3, 1)),),
        (SyncTensor("scalar", "c", torch.float32, ()),),
        (SyncTensor("number", "d", torch.int64, (2,)),),
    ]
    (bucket,) = plan_buckets(groups)
    buffer = torch.zeros(bucket.nbytes + 5, dtype=torch.uint8)
    views = bucket.views(buffer)
    assert {name: (view.dtype, tuple(view.shape)) for name, view in views.items()} == {
        tensor.name: (tensor.dtype, tensor.shape) for tensor in bucket.tensors
    }
    for number, view in enumerate(views.values(), start=1):
        view.view(-1).view(torch.uint8).fill_(number)
    sizes = [tensor.nbytes for tensor in bucket.tensors]
    assert buffer.tolist() == [n for n, size in enumerate(sizes, start=1) for _ in range(size)] + [0] * 5


@pytest.mark.parametrize(
    ("trained", "sent"),
    [
        ({"fc1"}, {"fc1", "fc2"}),  # parameters of one module: an engine has both in one layer
        ({"qkv"}, {"qkv"}),  # q trained alone is k and v as well, because they are one Megatron tensor
        ({"norm"}, {"norm"}),
        (set(), set()),
        ({"unknown"}, set()),
    ],
)
def test_what_is_loaded_together_is_sent_together(trained: set[str], sent: set[str]) -> None:
    groups = [
        group("qkv", "layers.0.q.weight", "layers.0.k.weight"),
        group("fc1", "layers.0.experts.gate_up_proj"),
        group("norm", "layers.0.norm.weight"),
        group("fc2", "layers.0.experts.down_proj"),
    ]
    assert {found[0].megatron for found in with_siblings(groups, trained)} == sent
