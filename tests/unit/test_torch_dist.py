"""bridge/torch_dist against torch's and Megatron-Core's own readers and writers, in both directions."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata

from bridge.errors import CheckpointError
from bridge.hf.tensors import TensorSpec
from bridge.torch_dist import pickles
from bridge.torch_dist.format import DTYPES, item_sizes, object_item, parse_item, tensor_item
from bridge.torch_dist.pickles import DictItems, Global, Instance
from bridge.torch_dist.reader import DistReader, is_dist_checkpoint
from bridge.torch_dist.writer import DistWriter

NAMES = {getattr(torch, torch_name): name for name, (torch_name, _) in DTYPES.items()}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sample(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = max(1, int(np.prod(shape)))
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count * dtype.itemsize,), dtype=torch.uint8)
    return data.view(dtype)[: int(np.prod(shape))].reshape(shape)


def read(reader: DistReader, key: str, start: int = 0, stop: int | None = None) -> bytes:
    tensor = reader.tensors[key]
    rows = tensor.shape[0] if tensor.shape else 1
    stop = rows if stop is None else stop
    out = np.empty(tensor.nbytes // max(rows, 1) * (stop - start), dtype=np.uint8)
    reader.read_rows(key, start, stop, out)
    return out.tobytes()


def write(folder: Path, tensors: dict[str, torch.Tensor], chunk_bytes: int = 64, file_bytes: int = 4000) -> None:
    folder.mkdir(exist_ok=True)
    specs = [TensorSpec(name, NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    with DistWriter(folder, specs, chunk_bytes, file_bytes) as writer:
        for name, tensor in reversed(tensors.items()):
            for chunk in writer.chunks(name):
                writer.write_rows(name, chunk.start, raw(tensor[chunk.start : chunk.stop] if tensor.ndim else tensor))
        writer.finish({"iteration": 7, "nested": {"a": [1, 2.5, None, True, "x", -5, 2**40]}})


TENSORS = {
    "decoder.qkv": sample(torch.bfloat16, (13, 6)),
    "decoder.norm": sample(torch.float32, (50,)),
    "decoder.scalar": sample(torch.bfloat16, ()),
    "decoder.experts": sample(torch.float16, (4, 6, 5)),
    "decoder.steps": sample(torch.int64, (3,)),
}


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("shape", [(), (1,), (300,), (7, 3), (0, 4), (2, 3, 4, 5)])
def test_items_are_what_torch_saves(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor, name = sample(dtype, shape), NAMES[dtype]
    payload = raw(tensor)
    head, tail = tensor_item(name, shape, 0x12345678)
    assert (len(head), len(payload), len(tail)) == item_sizes(name, shape)
    item = head + payload + tail
    loaded = torch.load(io.BytesIO(item), weights_only=True)
    assert loaded.dtype == dtype and loaded.shape == shape and loaded.is_contiguous() and raw(loaded) == payload
    saved = io.BytesIO()
    torch.save(tensor, saved)
    for data in (item, saved.getvalue()):
        found = parse_item(lambda offset, n, data=data: data[offset : offset + n], len(data), "item")
        assert (found.dtype, found.shape, found.strides) == (name, shape, tensor.stride())
        assert data[found.payload : found.payload + len(payload)] == payload


def test_items_are_valid_archives() -> None:
    payload = bytes(range(48))
    head, tail = tensor_item("F32", (3, 4), zlib.crc32(payload))
    with zipfile.ZipFile(io.BytesIO(head + payload + tail)) as archive:
        assert archive.testzip() is None and archive.read("archive/data/0") == payload
    value = [{"a": 1, "b": [None, True, 2.5, "ü"], "c": {"d": (1, -(2**70))}}]
    data = object_item(value)
    assert torch.load(io.BytesIO(data), weights_only=True) == value
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    assert is_dist_checkpoint(tmp_path)
    metadata = FileSystemReader(tmp_path).read_metadata()
    assert isinstance(metadata, Metadata)
    for info in metadata.storage_data.values():
        with (tmp_path / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dist.checkpoint.load(loaded, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    assert {name: raw(t) for name, t in loaded.items()} == {name: raw(t) for name, t in TENSORS.items()}


def test_we_read_what_we_write(tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    with DistReader(tmp_path) as reader:
        assert {k: (t.dtype, t.shape) for k, t in reader.tensors.items()} == {
            k: (NAMES[t.dtype], tuple(t.shape)) for k, t in TENSORS.items()
        }
        assert len(reader.tensors["decoder.qkv"].chunks) == 3
        for name, tensor in TENSORS.items():
            assert read(reader, name) == raw(tensor)
        assert read(reader, "decoder.qkv", 4, 11) == raw(TENSORS["decoder.qkv"][4:11])
        assert all(ok for _, _, ok in reader.check_items())
    file = tmp_path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    at = data.index(raw(TENSORS["decoder.norm"])[:40])
    data[at] ^= 1
    file.write_bytes(data)
    with DistReader(tmp_path) as reader:
        assert [key for key, _, ok in reader.check_items() if not ok] == ["decoder.norm"]


def test_boxes_of_any_cut_and_views_of_larger_storages(tmp_path: Path) -> None:
    """What torch saved: column and row boxes, three axes, a view into a storage, rows with gaps, a transposed one."""
    wide = torch.arange(40, dtype=torch.float32).reshape(4, 10)
    cube = sample(torch.bfloat16, (4, 6, 8))
    boxes: dict[str, tuple[torch.Tensor, list[tuple[tuple[int, ...], torch.Tensor]]]] = {
        "columns": (wide, [((0, 0), wide[:, :3].clone()), ((0, 3), wide[:, 3:])]),
        "grid": (
            wide,
            [((r, c), wide[r : r + 2, c : c + 5].clone()) for r in (0, 2) for c in (0, 5)],
        ),
        "irregular": (wide, [((0, 0), wide[:1]), ((1, 0), wide[1:, :4].clone()), ((1, 4), wide[1:, 4:])]),
        "cube": (cube, [((0, y, z), cube[:, y : y + 3, z : z + 4]) for y in (0, 3) for z in (0, 4)]),
    }
    save_boxes(tmp_path, boxes)
    with DistReader(tmp_path) as reader:
        for key, (tensor, _) in boxes.items():
            assert read(reader, key) == raw(tensor)
            assert read(reader, key, 1, 3) == raw(tensor[1:3])
        # The same with a buffer so small that every row is read by itself.
        module = importlib.import_module("bridge.torch_dist.reader")
        module._BOUNCE_BYTES = 16
        try:
            for key, (tensor, _) in boxes.items():
                assert read(reader, key) == raw(tensor)
        finally:
            module._BOUNCE_BYTES = 8 << 20
    save_boxes(tmp_path, {"turned": (wide, [((0, 0), torch.from_numpy(wide.numpy().copy(order="F")))])})
    with DistReader(tmp_path) as reader, pytest.raises(CheckpointError, match="row by row"):
        read(reader, "turned")


def save_boxes(folder: Path, boxes: Any) -> None:
    """Save boxes as torch.distributed.checkpoint would, views and all."""
    entries, storage = [], []
    file = folder / "__0_0.distcp"
    with file.open("wb") as out:
        for key, (tensor, parts) in boxes.items():
            chunks = []
            for offsets, part in parts:
                start = out.tell()
                data = io.BytesIO()
                torch.save(part, data)
                out.write(data.getvalue())
                chunks.append(meta("ChunkStorageMetadata", offsets=size(offsets), sizes=size(tuple(part.shape))))
                index = meta("MetadataIndex", fqn=key, index=None, offset=size(offsets))
                place = {"relative_path": file.name, "offset": start, "length": out.tell() - start}
                storage.append((index, Instance(Global(FILESYSTEM, "_StorageInfo"), (), place)))
            entries.append((key, tensor_meta(chunks, tuple(tensor.shape), Global("torch", str(tensor.dtype)[6:]))))
    finish_boxes(folder, entries, storage)


FILESYSTEM = "torch.distributed.checkpoint.filesystem"
META = "torch.distributed.checkpoint.metadata"


def meta(name: str, **state: Any) -> Instance:
    return Instance(Global(META, name), (), state)


def size(shape: tuple[int, ...]) -> pickles.Call:
    return pickles.Call(Global("torch", "Size"), (shape,))


def tensor_meta(chunks: list[Instance], shape: tuple[int, ...], dtype: Global) -> Instance:
    properties = Instance(Global(META, "TensorProperties"), (), (dtype, None, False, None, False))
    return meta("TensorStorageMetadata", properties=properties, size=size(shape), chunks=chunks)


def finish_boxes(folder: Path, entries: list[tuple[str, Instance]], storage: list[tuple[Instance, Instance]]) -> None:
    tree = meta(
        "Metadata",
        state_dict_metadata=DictItems(list(entries)),
        planner_data=None,
        storage_data=DictItems(list(storage)),
    )
    (folder / ".metadata").write_bytes(pickles.dumps(tree))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def one_box(folder: Path, **change: Any) -> None:
    """A checkpoint of one [4, 3] tensor in two chunks, with something wrong about it."""
    facts: dict[str, Any] = {
        "shape": (4, 3),
        "dtype": Global("torch", "float32"),
        "boxes": [((0, 0), (2, 3)), ((2, 0), (2, 3))],
        "file": "__0_0.distcp",
        "shift": 0,
        "saved": (2, 3),
        "descriptors": None,
    } | change
    data = io.BytesIO()
    torch.save(torch.zeros(facts["saved"]), data)
    (folder / "__0_0.distcp").write_bytes(data.getvalue())
    chunks, storage = [], []
    for offsets, sizes in facts["boxes"]:
        chunks.append(meta("ChunkStorageMetadata", offsets=size(offsets), sizes=size(sizes)))
        place = {"relative_path": facts["file"], "offset": facts["shift"], "length": len(data.getvalue())}
        if facts["descriptors"]:
            place["transform_descriptors"] = facts["descriptors"]
        index = meta("MetadataIndex", fqn="w", index=None, offset=size(offsets))
        storage.append((index, Instance(Global(FILESYSTEM, "_StorageInfo"), (), place)))
    finish_boxes(folder, [("w", tensor_meta(chunks, facts["shape"], facts["dtype"]))], storage)


LIES: dict[str, dict[str, Any]] = {
    "leave holes": {"boxes": [((0, 0), (2, 3))]},
    "overlap": {"boxes": [((0, 0), (3, 3)), ((2, 0), (1, 3))]},
    "beyond the shape": {"boxes": [((0, 0), (2, 3)), ((3, 0), (2, 3))]},
    "axes": {"boxes": [((0,), (4,))]},
    "not inside": {"file": "../__0_0.distcp"},
    "is not inside": {"file": "/etc/passwd"},
    "not found": {"file": "other.distcp"},
    "truncated": {"shift": 1},
    "no place": {"shift": -1},
    "compressed": {"descriptors": ["zstd"]},
    "dtype": {"dtype": Global("torch", "complex64")},
    "metadata say": {"saved": (3, 2)},
    "holds F32": {"dtype": Global("torch", "int32")},
    "fewer bytes": {"shape": (2**40, 3), "boxes": [((0, 0), (2**40, 3))]},
    "no shape": {"shape": (2**60, 3)},
}


@pytest.mark.parametrize("text", LIES)
def test_metadata_that_lie(tmp_path: Path, text: str) -> None:
    one_box(tmp_path)
    with DistReader(tmp_path) as reader:
        assert read(reader, "w") == bytes(48)
    one_box(tmp_path, **LIES[text])
    with pytest.raises(CheckpointError, match=text) as caught, DistReader(tmp_path) as reader:
        read(reader, "w")
    assert str(caught.value).isprintable()


def test_planted_code_never_runs(tmp_path: Path) -> None:
    class Plant:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "planted"),))

    one_box(tmp_path)
    for protocol in range(6):
        (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": Plant()}, protocol=protocol))
        with pytest.raises(CheckpointError, match=r"\.metadata: its pickle (names|uses)"):
            DistReader(tmp_path)
    data = io.BytesIO()
    torch.save(Plant(), data)
    place = {"relative_path": "__0_0.distcp", "offset": 0, "length": len(data.getvalue())}
    (tmp_path / "__0_0.distcp").write_bytes(data.getvalue())
    chunk = meta("ChunkStorageMetadata", offsets=size((0,)), sizes=size((2,)))
    index = meta("MetadataIndex", fqn="w", index=None, offset=size((0,)))
    entries = [("w", tensor_meta([chunk], (2,), Global("torch", "float32")))]
    finish_boxes(tmp_path, entries, [(index, Instance(Global(FILESYSTEM, "_StorageInfo"), (), place))])
    with pytest.raises(CheckpointError, match="refused as unsafe"), DistReader(tmp_path) as reader:
        read(reader, "w")
    assert not (tmp_path / "planted").exists()


def test_pickles_round_trip() -> None:
    tree = {
        "a": [1, 300, 70000, -1, 2**40, -(2**40)],
        "b": (),
        "c": (True, None, 1.5),
        "d": {},
        "e": [],
        "f": "ü" * 300,
    }
    assert pickle.loads(pickles.dumps(tree)) == tree
    back = pickles.loads(pickle.dumps(tree, protocol=4), lambda *_: False, "x")
    assert back.strings()["a"] == tree["a"] and back.strings()["c"] == tree["c"]
    # A tuple that doubles at every level would take the standard Unpickler for ever to hash.
    bomb = b"\x80\x04)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(80)) + b"."
    assert pickles.loads(bomb, lambda *_: False, "x") is not None
    for data in (
        b"",
        b".",
        b"\x80",
        b"\x80\x09.",
        b"h\x05.",
        b"r\xff\xff\xff\xff.",
        b"(((.",
        b"X\xff\xff\xff\x7fabc.",
        b"t.",
    ):
        with pytest.raises(CheckpointError):
            pickles.loads(data, lambda *_: False, "x")


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, bridge.hf.folder, bridge.hf.writer, bridge.torch_dist.reader, bridge.torch_dist.writer,"
        "bridge.convert.stream, bridge.convert.atomic;"
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_writer_refuses_what_is_not_a_chunk(tmp_path: Path) -> None:
    writer = DistWriter(tmp_path, [TensorSpec("a", "F32", (10, 2))], chunk_bytes=32)
    assert [(c.start, c.stop) for c in writer.chunks("a")] == [(0, 4), (4, 8), (8, 10)]
    for start, nbytes in ((1, 32), (0, 8), (0, 40), (8, 24)):
        with pytest.raises(CheckpointError, match="whole chunks"):
            writer.write_rows("a", start, bytes(nbytes))
    writer.close()
    with pytest.raises(CheckpointError, match="plain values"):
        full = DistWriter(tmp_path, [TensorSpec("a", "F32", (1,))])
        full.write_rows("a", 0, bytes(4))
        full.finish({"bad": Path("x")})
    assert not (tmp_path / ".metadata").exists()
    with pytest.raises(CheckpointError, match="does not fit"):
        DistWriter(tmp_path, [TensorSpec("a", "F32", (2, 2**31))])


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """megatron.core.dist_checkpointing in a world of one rank, on the CPU where there is no GPU."""
    runtime = importlib.import_module("bridge.megatron.cpu_runtime")
    runtime.enable()
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        yield importlib.import_module("megatron.core.dist_checkpointing")
    finally:
        dist.destroy_process_group()
        runtime.disable()


def test_megatron_reads_what_we_write(megatron: Any, tmp_path: Path) -> None:
    write(tmp_path, TENSORS)
    sharded = megatron.ShardedTensor.from_rank_offsets
    wanted: dict[str, Any] = {
        f"whole.{i}": sharded(key, torch.zeros_like(t)) for i, (key, t) in enumerate(TENSORS.items())
    }
    # Another layout: columns of one, the second half of the experts of the other.
    wanted["columns"] = sharded("decoder.qkv", torch.zeros(13, 3, dtype=torch.bfloat16), (1, 1, 2))
    wanted["experts"] = sharded("decoder.experts", torch.zeros(2, 6, 5, dtype=torch.float16), (0, 1, 2))
    loaded = megatron.load(dict(wanted), str(tmp_path), validate_access_integrity=False)
    for i, tensor in enumerate(TENSORS.values()):
        assert raw(loaded[f"whole.{i}"]) == raw(tensor)
    assert raw(loaded["columns"]) == raw(TENSORS["decoder.qkv"][:, 3:])
    assert raw(loaded["experts"]) == raw(TENSORS["decoder.experts"][2:])
    assert loaded["iteration"] == 7 and loaded["nested"]["a"] == [1, 2.5, None, True, "x", -5, 2**40]
    assert megatron.load_content_metadata(str(tmp_path)) == {"non_homogeneous_layers": True}
    whole = {key: sharded(key, torch.zeros_like(t)) for key, t in TENSORS.items()}
    strict = megatron.load(whole, str(tmp_path), strict="raise_all")
    assert all(raw(strict[key]) == raw(tensor) for key, tensor in TENSORS.items())


def test_we_read_what_megatron_writes(megatron: Any, tmp_path: Path) -> None:
    sharded = megatron.ShardedTensor.from_rank_offsets
    mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")
    qkv, experts = TENSORS["decoder.qkv"], TENSORS["decoder.experts"]
    fc1 = sample(torch.bfloat16, (8, 4))
    state = {
        "left": sharded("qkv", qkv[:, :3].contiguous(), (1, 0, 2)),
        "right": sharded("qkv", qkv[:, 3:], (1, 1, 2)),
        "gate": sharded("fc1", fc1[:4], (0, 0, 2)),
        "up": sharded("fc1", fc1[4:], (0, 1, 2)),
        "experts.0": sharded("experts", experts[0], (0, 0, 4), prepend_axis_num=1),
        "experts.1": sharded("experts", experts[1], (0, 1, 4), prepend_axis_num=1),
        "experts.2": sharded("experts", experts[2], (0, 2, 4), prepend_axis_num=1),
        "experts.3": sharded("experts", experts[3], (0, 3, 4), prepend_axis_num=1),
        "scalar": sharded("scalar", TENSORS["decoder.scalar"]),
        "extra": mapping.ShardedObject("fc1._extra_state", {"anything": 1}, (1,), (0,)),
        "exp_avg": sharded("optimizer.state.exp_avg.fc1", torch.zeros(8, 4)),
        "iteration": 3,
    }
    megatron.save(state, str(tmp_path), content_metadata={"non_homogeneous_layers": True})
    with DistReader(tmp_path) as reader:
        assert set(reader.tensors) == {"qkv", "fc1", "experts", "scalar"}
        assert len(reader.tensors["qkv"].chunks) == 2 and reader.tensors["experts"].shape == (4, 6, 5)
        for key, tensor in {"qkv": qkv, "fc1": fc1, "experts": experts, "scalar": TENSORS["decoder.scalar"]}.items():
            assert read(reader, key) == raw(tensor)
        assert read(reader, "experts", 1, 3) == raw(experts[1:3])
        assert all(ok for _, _, ok in reader.check_items())


def test_torch_writer_is_read_too(tmp_path: Path) -> None:
    dist.checkpoint.save({"a": torch.arange(6.0)}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with DistReader(tmp_path) as reader:
        assert read(reader, "a") == raw(torch.arange(6.0))
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match="zarr"):
        DistReader(tmp_path)
