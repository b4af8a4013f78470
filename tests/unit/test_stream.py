"""The streaming copy: plans, dtypes, threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridge.convert.dtypes import FLOATS, convert
from bridge.convert.pieces import CopyTensor, Piece
from bridge.convert.stream import compare, copy
from bridge.convert.threads import parallel
from bridge.errors import CheckpointError, MappingError
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import ITEM_SIZES, TensorSpec, as_bytes, num_rows, row_bytes
from bridge.hf.writer import HfWriter

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class Memory:
    """A reader of arrays in memory."""

    def __init__(self, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
        self.tensors = {name: TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in tensors.items()}
        self.data = {name: data for name, (_, _, data) in tensors.items()}

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        step = row_bytes(self.tensors[name])
        as_bytes(out)[:] = self.data[name][start * step : stop * step]


def random_source(seed: int) -> Memory:
    rng = np.random.default_rng(seed)
    shapes = {"q": (12, 5), "k": (4, 5), "v": (4, 5), "s": (), "cube": (3, 2, 5), "one": (1,)}
    return Memory({name: ("BF16", shape, rng.bytes(2 * int(np.prod(shape)))) for name, shape in shapes.items()})


PLAN = [
    # Three query rows, a key row and a value row of each of four groups.
    CopyTensor(
        "qkv",
        "BF16",
        (20, 5),
        tuple(
            piece
            for g in range(4)
            for piece in (Piece(5 * g, "q", 3 * g, 3), Piece(5 * g + 3, "k", g, 1), Piece(5 * g + 4, "v", g, 1))
        ),
    ),
    CopyTensor("s", "BF16", (1,), (Piece(0, "s", 0, 1),)),
    CopyTensor("one", "BF16", (), (Piece(0, "one", 0, 1),)),
    CopyTensor("cube", "BF16", (3, 10), (Piece(0, "cube", 0, 2), Piece(2, "cube", 2, 1))),
]


@pytest.mark.parametrize("chunk_bytes", [1, 30, 1 << 20])
def test_interleaved_copy(tmp_path: Path, chunk_bytes: int) -> None:
    source = random_source(0)
    seen: list[tuple[int, int, str]] = []
    with HfWriter(tmp_path, [t.spec for t in PLAN], max_shard_size=100) as writer:
        result = copy(PLAN, source, writer, chunk_bytes=chunk_bytes, progress=lambda *step: seen.append(step))
        writer.finish()
    assert seen[-1][:2] == (result.bytes_total, result.bytes_total)
    q, k, v = (np.frombuffer(source.data[name], dtype=np.uint16).reshape(4, -1, 5) for name in "qkv")
    expected = np.concatenate([q, k, v], axis=1).tobytes()
    with HfFolder(tmp_path) as written:
        out = np.empty(len(expected), dtype=np.uint8)
        written.read_rows("qkv", 0, 20, out)
        assert out.tobytes() == expected
        assert [(name, ok) for name, ok, _ in compare(PLAN, source, written, chunk_bytes=16)] == [
            (t.name, True) for t in PLAN
        ]
        damaged = bytearray(source.data["k"])
        damaged[11] ^= 1
        source.data["k"] = bytes(damaged)
        source.data["s"] = bytes(a ^ 255 for a in source.data["s"])
        report = {name: (ok, detail) for name, ok, detail in compare(PLAN, source, written)}
        assert report["qkv"][0] is False and report["qkv"][1].startswith("row 8, element 0")
        assert not report["s"][0] and report["one"][0] and report["cube"][0]
        wider = [CopyTensor("absent", "BF16", (), PLAN[2].pieces), CopyTensor("s", "F32", (1,), PLAN[1].pieces)]
        assert [(ok, bool(detail)) for _, ok, detail in compare(wider, source, written)] == [(False, True)] * 2


BAD_PLANS = {
    "from nowhere": CopyTensor("t", "BF16", (4, 5), (Piece(0, "k", 0, 2), Piece(3, "k", 3, 1))),
    "two places": CopyTensor("t", "BF16", (4, 5), (Piece(0, "k", 0, 3), Piece(2, "k", 2, 2))),
    "have 3 rows": CopyTensor("t", "BF16", (4, 5), (Piece(0, "k", 0, 3),)),
    "which has 4": CopyTensor("t", "BF16", (4, 5), (Piece(0, "k", 1, 4),)),
    "elements a row": CopyTensor("t", "BF16", (4, 4), (Piece(0, "k", 0, 4),)),
    "does not have": CopyTensor("t", "BF16", (4, 5), (Piece(0, "nothing", 0, 4),)),
    "cannot be converted": CopyTensor("t", "I16", (4, 5), (Piece(0, "k", 0, 4),)),
    "not supported": CopyTensor("t", "I17", (4, 5), (Piece(0, "k", 0, 4),)),
    "takes rows 0 to 0": CopyTensor("t", "BF16", (4, 5), (Piece(0, "k", 0, 0), Piece(0, "k", 0, 4))),
}


@pytest.mark.parametrize("text", BAD_PLANS)
def test_bad_plans_are_refused_before_anything_is_written(tmp_path: Path, text: str) -> None:
    plan = BAD_PLANS[text]
    spec = TensorSpec(plan.name, "I16" if plan.dtype == "I17" else plan.dtype, plan.shape)
    with pytest.raises(MappingError, match=text) as caught, HfWriter(tmp_path, [spec]) as writer:
        copy([plan], random_source(0), writer)
    assert "tensor t" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def every_pattern(dtype: str) -> np.ndarray[Any, Any]:
    """All values of a 16-bit float; of a wider one random bits and the edges."""
    if ITEM_SIZES[dtype] == 2:
        return np.arange(65536, dtype=np.uint16)
    kind = np.uint32 if dtype == "F32" else np.uint64
    width, mantissa = (32, 23) if dtype == "F32" else (64, 52)
    rng = np.random.default_rng(1)
    noise = np.frombuffer(rng.bytes(400_000), dtype=kind)
    # Values within reach of the narrow types, and exact ties between their neighbours.
    near = (rng.standard_normal(50_000) * np.exp(rng.uniform(-30, 30, 50_000))).astype(f"f{width // 8}").view(kind)
    ties = near & kind(~((1 << (mantissa - 7)) - 1) & (2**width - 1)) | kind(1 << (mantissa - 8))
    edges = [0, 1, 1 << (width - 1), (1 << mantissa) - 1]
    top = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    edges += [
        top,
        top | 1,
        top - 1,
        top | (1 << (mantissa - 1)),
        top | (1 << (width - 1)),
        top | 5 | (1 << (width - 1)),
    ]
    return np.concatenate([noise, near, ties, ties + kind(1), ties - kind(1), np.array(edges, dtype=kind)])


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_dtypes(source: str, target: str) -> None:
    """Numbers as torch converts them (no worse where it rounds twice, from F64 to 16 bits); NaNs to and fro."""
    bits = every_pattern(source)
    out = np.empty(len(bits) * ITEM_SIZES[target], dtype=np.uint8)
    convert(memoryview(bits).cast("B"), source, memoryview(out), target)
    values = torch.from_numpy(bits.view(np.uint8).copy()).view(TORCH[source])
    ours, theirs = torch.from_numpy(out).view(TORCH[target]), values.to(TORCH[target])
    nan = values.isnan()
    assert torch.equal(ours.isnan(), nan)
    if source != "F64" or target in ("F32", "F64"):
        assert torch.equal(ours[~nan].view(torch.uint8), theirs[~nan].view(torch.uint8))
    else:
        wide, narrow = values[~nan], ours[~nan].to(torch.float64)
        finite = narrow.isfinite()
        assert bool(((wide - narrow).abs() <= (wide - theirs[~nan].to(torch.float64)).abs())[finite].all())
    if ITEM_SIZES[target] >= ITEM_SIZES[source] and (source, target) not in (("BF16", "F16"), ("F16", "BF16")):
        back = np.empty(bits.nbytes, dtype=np.uint8)
        convert(memoryview(out), target, memoryview(back), source)
        assert back.tobytes() == bits.tobytes()


def test_copy_converts_and_goes_back(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    source = Memory({"a": ("BF16", (256, 256), bits.tobytes())})
    plan = [CopyTensor("a", "F32", (256, 256), (Piece(0, "a", 0, 256),))]
    with HfWriter(tmp_path, [plan[0].spec]) as writer:
        copy(plan, source, writer, chunk_bytes=5000)
        writer.finish()
    with HfFolder(tmp_path) as wide:
        back = [CopyTensor("a", "BF16", (256, 256), (Piece(0, "a", 0, 256),))]
        assert [ok for _, ok, _ in compare(back, wide, source)] == [True]


def test_threads_stop_at_an_error_an_interrupt_and_a_closed_iterator() -> None:
    done: list[int] = []

    def worker() -> Any:
        def work(task: int) -> int:
            if task == 5:
                raise CheckpointError("five")
            time.sleep(0.002)
            done.append(task)
            return task

        return work

    before = threading.active_count()
    with pytest.raises(CheckpointError, match="five"):
        list(parallel(range(10_000), worker, 3))
    assert len(done) < 100 and threading.active_count() == before
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        for _ in parallel(range(6, 10_000), worker, 3):
            raise KeyboardInterrupt
    assert len(done) < 100 and threading.active_count() == before
    assert sorted(parallel(range(6, 50), worker, 3)) == list(range(6, 50))
    assert list(parallel([], worker, 3)) == []


def test_a_source_that_fails_midway(tmp_path: Path) -> None:
    class Failing(Memory):
        def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
            if start >= 2:
                raise CheckpointError(f"tensor {name}: gone")
            super().read_rows(name, start, stop, out)

    source = Failing({"a": ("BF16", (4, 5), bytes(40))})
    plan = [CopyTensor("a", "BF16", (4, 5), (Piece(0, "a", 0, 4),))]
    assert num_rows(plan[0].shape) == 4
    with pytest.raises(CheckpointError, match="gone"), HfWriter(tmp_path, [plan[0].spec]) as writer:
        copy(plan, source, writer, chunk_bytes=10)
