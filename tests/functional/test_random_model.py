"""Random models of the benchmarks: made where they are wanted, with the numbers that a toy's files have."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.attention_check import Sizes, _subjects, accuracy
from benchmarks.loss import arguments
from benchmarks.random_model import RandomModel, _Rows
from bridge.convert.live import TensorSource
from bridge.megatron.attention_backends import BACKENDS
from bridge.ranks import RankPool
from bridge.toy.weights import chunks
from recipes.simulate.fake_device import FakeDevice
from recipes.simulate.stand_ins import DEVICE


def named(rows: _Rows, ending: str) -> str:
    """The tensor whose name ends so, whatever stands before."""
    (name,) = (name for name in rows.tensors if name.endswith(ending))
    return name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_those_of_the_files(dtype: torch.dtype) -> None:
    """Of a tensor that repeats its block, of a short one, and of a scalar; whole, and from the middle."""
    model = RandomModel("e2b", dtype)
    rows = _Rows(model, torch.device("cpu"))
    assert isinstance(rows, TensorSource)
    for ending in ("layers.0.self_attn.q_proj.weight", "layers.0.input_layernorm.weight", "layers.0.layer_scalar"):
        name = named(rows, ending)
        spec = rows.tensors[name]
        pieces = [part.copy() for _, part in chunks(name, spec.shape, spec.dtype, "e2b", 0)]
        expected = torch.from_numpy(np.concatenate(pieces) if spec.shape else pieces[0]).view(dtype)
        count = spec.shape[0] if spec.shape else 1
        found = rows.tensor_rows(name, 0, count)
        assert torch.equal(found.view(spec.shape), expected)
        if count > 5:
            low, high = count // 3, count - 2
            assert torch.equal(rows.tensor_rows(name, low, high), expected[low:high])


def device_of_rows() -> tuple[str, int, int]:
    """Runs on a rank."""
    rows = _Rows(RandomModel("e2b"), DEVICE)
    with FakeDevice() as device:
        made = rows.tensor_rows(named(rows, "embed_tokens.weight"), 0, 65_536)
        hidden, weight, labels = arguments(64, 32, 4096, DEVICE, torch.bfloat16)
        held = device.held
    # Kept by the reader, and made: not the tensor, which has 100 million numbers.
    assert {hidden.device, weight.device, labels.device} == {made.device} and not device.reads
    return made.device.type, held, sum(device.copies.values())


def test_numbers_are_made_on_the_device(ranks: RankPool) -> None:
    """What comes from the host is one block, of at most 262,144 numbers."""
    ((where, held, copies),) = ranks.run(device_of_rows, world_size=1)
    assert where == "meta" and copies == 1 and held >= 2 * 65_536 * 1536


def accuracies(broken: bool) -> list[dict[str, object]]:
    """Runs on a rank."""
    sizes = Sizes.of(toy=True)
    subject = next(iter(_subjects(toy=True)))
    whole = BACKENDS["dense"]
    if broken:
        BACKENDS["dense"] = whole._replace(attend=lambda q, k, v, mask: whole.attend(q, k, v, mask) * 1.02)
    try:
        return [accuracy(subject, sizes, name) for name in sizes.rounds[0]]
    finally:
        BACKENDS["dense"] = whole


@pytest.mark.parametrize("broken", [False, True])
def test_attention_is_held_against_float32(ranks: RankPool, broken: bool) -> None:
    (found,) = ranks.run(accuracies, broken, world_size=1)
    assert [line["backend"] for line in found] == ["dense", "blockwise", "flex_triton"]
    assert [line.get("ok") for line in found] == [not broken, True, None]
    assert found[2]["skipped"] == "it needs a Hopper GPU"
