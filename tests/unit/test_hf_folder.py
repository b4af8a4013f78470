"""bridge/hf against safetensors itself, and against folders that lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.errors import BridgeError, CheckpointError, UsageError
from bridge.hf.folder import HfFolder
from bridge.hf.hub import model_name
from bridge.hf.tensors import TensorSpec
from bridge.hf.writer import HfWriter, parse_size

TENSORS = {
    "model.embed": torch.arange(35, dtype=torch.float32).reshape(5, 7).bfloat16(),
    "model.norm": torch.linspace(-1, 1, 6),
    "model.scalar": torch.tensor(2.5, dtype=torch.bfloat16),
    "model.experts": torch.arange(24, dtype=torch.int64).reshape(2, 3, 4),
    "model.half": torch.arange(3, dtype=torch.float16),
    "model.flag": torch.tensor([True, False, True]),
}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "hf"
    (path / "sub").mkdir(parents=True)
    save_file(TENSORS, path / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json", "sub/chat_template.jinja", "pytorch_model.bin"):
        (path / name).write_text(name)
    return path


def test_reads_what_safetensors_wrote(folder: Path) -> None:
    with HfFolder(folder) as hf:
        assert hf.file_metadata == {"format": "pt"}
        assert hf.assets == [Path("config.json"), Path("sub/chat_template.jinja"), Path("tokenizer.json")]
        assert hf.ignored == [Path("pytorch_model.bin")]
        assert set(hf.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            info = hf.tensors[name]
            assert info.shape == tuple(tensor.shape) and info.nbytes == len(raw(tensor))
            rows = info.shape[0] if info.shape else 1
            out = np.empty(info.nbytes, dtype=np.uint8)
            hf.read_rows(name, 0, rows, out)
            assert out.tobytes() == raw(tensor)
        part = np.empty(2 * 7 * 2, dtype=np.uint8)
        hf.read_rows("model.embed", 1, 3, part)
        assert part.tobytes() == raw(TENSORS["model.embed"][1:3])
        for start, stop, size in ((4, 6, 28), (3, 2, 0), (-1, 1, 28), (0, 1, 13)):
            with pytest.raises(CheckpointError, match=r"model\.embed"):
                hf.read_rows("model.embed", start, stop, np.empty(size, dtype=np.uint8))
        with pytest.raises(CheckpointError, match="nothing"):
            hf.read_rows("nothing", 0, 1, part)


def test_file_that_shrinks_is_an_error(folder: Path) -> None:
    with HfFolder(folder) as hf:
        os.truncate(folder / "model.safetensors", 20)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte"):
            hf.read_rows("model.embed", 0, 5, np.empty(70, dtype=np.uint8))


@pytest.mark.parametrize("shard_size", [10**9, 100, 1])
def test_writes_what_safetensors_reads(tmp_path: Path, shard_size: int) -> None:
    with HfFolder(make(tmp_path / "in")) as hf:
        specs = [TensorSpec(info.name, info.dtype, info.shape) for info in hf.tensors.values()]
    out = tmp_path / "out"
    out.mkdir()
    with HfWriter(out, specs, shard_size) as writer:
        for name, tensor in reversed(TENSORS.items()):
            if tensor.ndim:
                writer.write_rows(name, 1, raw(tensor[1:]))
            writer.write_rows(name, 0, raw(tensor[:1] if tensor.ndim else tensor))
        writer.finish()
    files = sorted(out.glob("*.safetensors"))
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0
        loaded |= load_file(file)
    assert {name: raw(tensor) for name, tensor in loaded.items()} == {name: raw(t) for name, t in TENSORS.items()}
    assert all(loaded[name].dtype == t.dtype and loaded[name].shape == t.shape for name, t in TENSORS.items())
    if shard_size == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(len(raw(t)) for t in TENSORS.values())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        assert set(index["weight_map"].values()) == {file.name for file in files}
    with HfFolder(out) as again:
        assert set(again.tensors) == set(TENSORS)


def make(path: Path) -> Path:
    path.mkdir()
    save_file(TENSORS, path / "model.safetensors")
    return path


def test_writer_notices_missing_and_double_rows(tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (4, 2))]
    writer = HfWriter(tmp_path, specs)
    writer.write_rows("a", 0, bytes(8))
    writer.write_rows("a", 2, bytes(16))
    with pytest.raises(CheckpointError, match="rows 1 to 2 of a were not written"):
        writer.finish()
    writer.write_rows("a", 1, bytes(16))
    with pytest.raises(CheckpointError, match="rows 2 to 3 of a were written twice"):
        writer.finish()
    with pytest.raises(CheckpointError, match="rows 3 to 5"):
        writer.write_rows("a", 3, bytes(16))
    writer.close()


def entry(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "no json": (b"{not json", bytes(8), "not JSON"),
    "no object": (b"[1, 2]", bytes(8), "start with"),
    "duplicate": (b'{"a": 1, "a": 2}', bytes(8), "twice"),
    "deep": (b'{"a":' * 100_000, b"", "too deep|not JSON"),
    "utf8": (b'{"\xff": 1}', b"", "UTF-8"),
    "dtype": ({"a": entry(dtype="Q4")}, bytes(8), "dtype Q4"),
    "dtype type": ({"a": entry(dtype=3)}, bytes(8), "dtype"),
    "negative": ({"a": entry(shape=(-2,))}, bytes(8), "shape"),
    "float": ({"a": entry(shape=(2.0,))}, bytes(8), "shape"),
    "bool": ({"a": entry(shape=(True, True), end=4)}, bytes(4), "shape"),
    "huge": ({"a": entry(shape=(2**40, 2**40))}, bytes(8), "larger than any"),
    "huge int": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', b"", "not JSON"),
    "many axes": ({"a": entry(shape=(1,) * 99)}, bytes(8), "shape"),
    "size": ({"a": entry(shape=(3,))}, bytes(8), "need 12"),
    "offsets": ({"a": entry(begin=8, end=0)}, bytes(8), "data_offsets"),
    "keys": ({"a": {"dtype": "F32"}}, bytes(8), "header entry"),
    "overlap": ({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12), "overlaps"),
    "hole": ({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20), "hole of 4"),
    "truncated": ({"a": entry()}, bytes(7), "truncated"),
    "too long": ({"a": entry()}, bytes(9), "1 bytes behind"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8), "__metadata__"),
    "no name": ({"": entry()}, bytes(8), "no name"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_headers_are_refused(tmp_path: Path, case: str) -> None:
    header, data, text = BAD_HEADERS[case]
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=text) as caught:
        HfFolder(tmp_path)
    assert "model.safetensors" in str(caught.value) and "\n" not in str(caught.value)


def test_header_length_is_bounded(tmp_path: Path) -> None:
    for length in (2**63, 10**9, 100):
        (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(CheckpointError, match="header of"):
            HfFolder(tmp_path)


def test_a_pointer_of_git_lfs_is_called_that(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        HfFolder(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    def index(weight_map: Any) -> None:
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        (tmp_path / "model.safetensors.index.json").write_text(text)

    def refused(text: str) -> None:
        with pytest.raises(CheckpointError, match=text) as caught:
            HfFolder(tmp_path)
        assert "\n" not in str(caught.value)

    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": torch.zeros(2)}, tmp_path / one)
    save_file({"b": torch.zeros(2)}, tmp_path / two)
    index({"a": one, "b": two})
    with HfFolder(tmp_path) as hf:
        assert list(hf.tensors) == ["a", "b"] and len(hf.files) == 2
    index({"a": one, "b": two, "c": two})
    refused("lacks the tensor c")
    save_file({"b": torch.zeros(2), "d": torch.zeros(2)}, tmp_path / two)
    index({"a": one, "b": two})
    refused("holds the tensor d")
    index({"a": one, "b": "model-00003.safetensors"})
    refused("not found")
    for escape in ("../secret.safetensors", "/etc/passwd.safetensors", "x/../../y.safetensors", "", "a\0.safetensors"):
        index({"a": escape})
        refused("not inside|not a safetensors")
    index({"a": "weights.bin"})
    refused("not a safetensors file")
    index({"a": 3})
    refused("no file name")
    index('{"weight_map": {"a": "x", "a": "y"}}')
    refused("twice")
    index("{}")
    refused("no weight_map")
    (tmp_path / "model.safetensors.index.json").unlink()
    refused("neither")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    refused("pickle")


def test_links_must_stay_inside_except_in_the_hub_cache(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = make(tmp_path / "hf")
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a link that leads out"):
        HfFolder(folder)
    cache = tmp_path / "models--x"
    blob = cache / "blobs" / "1"
    snapshot = cache / "snapshots" / "abc"
    blob.parent.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, blob)
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    with HfFolder(snapshot) as hf:
        assert list(hf.tensors) == ["a"]
    os.mkfifo(snapshot / "pipe")
    with pytest.raises(CheckpointError, match="pipe"):
        HfFolder(snapshot)


def test_names_never_break_the_line(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"a\nTraceback: \x1b[31m": entry(shape=(3,))}, bytes(8))
    with pytest.raises(BridgeError) as caught:
        HfFolder(tmp_path)
    assert str(caught.value).isprintable()


def test_parse_size() -> None:
    assert parse_size("5GB") == 5 * 10**9 and parse_size("2GiB") == 2 << 30 and parse_size("1.5 kb") == 1500
    assert parse_size(77) == 77 and parse_size("12") == 12
    for text in ("", "GB", "-1GB", "0", "5XB", "1e3"):
        with pytest.raises(UsageError):
            parse_size(text)


def test_columns_are_read_alone(folder: Path) -> None:
    """Each rank of a row-parallel linear reads its own columns of every row."""
    tensors = load_file(folder / "model.safetensors")
    with HfFolder(folder) as opened:
        name = next(name for name, tensor in tensors.items() if tensor.dim() == 2 and tensor.shape[1] > 3)
        rows, columns = tensors[name].shape
        item = tensors[name].element_size()
        out = np.empty((rows - 1) * 2 * item, dtype=np.uint8)
        opened.read_columns(name, 1, rows, 1, 3, out)
        expected = tensors[name][1:, 1:3].contiguous().view(-1).view(torch.uint8).numpy()
        assert (out == expected).all()
        for bad in ((0, rows + 1, 0, 1), (0, 1, 0, columns + 1), (0, 1, 2, 2), (-1, 1, 0, 1)):
            with pytest.raises(CheckpointError, match="elements"):
                opened.read_columns(name, *bad, np.empty(8, dtype=np.uint8))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("hub/models--google--gemma-4-E2B-it/snapshots/0f1e2d3c", "google/gemma-4-E2B-it"),
        ("toys/e2b", "e2b"),
        ("snapshots/mine", "mine"),
    ],
)
def test_a_model_of_the_hub_is_called_by_its_id(tmp_path: Path, folder: str, name: str) -> None:
    assert model_name(tmp_path / folder) == name
