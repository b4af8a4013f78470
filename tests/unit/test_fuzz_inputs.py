"""Two hundred damaged inputs: each must end in one clear line, quickly, in little memory, and outside of nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bridge.convert.atomic import staged
from bridge.convert.pieces import CopyTensor, Piece
from bridge.convert.stream import copy
from bridge.errors import BridgeError
from bridge.hf.folder import HfFolder
from bridge.hf.tensors import num_rows
from bridge.hf.writer import HfWriter
from bridge.torch_dist.reader import DistReader
from bridge.torch_dist.writer import DistWriter

CASES = 100
NUMBERS = (
    -1,
    0,
    1,
    7,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    1.5,
    "8",
    None,
    True,
)
PATHS = (
    "../x.safetensors",
    "/etc/passwd",
    "a/../../b.safetensors",
    "..",
    "",
    "\0",
    "//x",
    "C:\\x",
    "x" * 5000,
    "config.json",
)


class Plant:
    """Code that would leave a folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


def make_hf(folder: Path) -> None:
    folder.mkdir()
    shards = {f"model-0000{i}-of-00002.safetensors": {f"t{i}.{j}": torch.randn(6, 4) for j in range(3)} for i in (1, 2)}
    weight_map = {}
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


def make_dist(folder: Path, hf: Path) -> None:
    folder.mkdir()
    with HfFolder(hf) as source:
        plan = whole(source)
        with DistWriter(folder, [t.spec for t in plan], chunk_bytes=40, file_bytes=3000) as writer:
            copy(plan, source, writer)
            writer.finish({"iteration": 0})


def whole(reader: HfFolder | DistReader) -> list[CopyTensor]:
    return [
        CopyTensor(name, t.dtype, t.shape, (Piece(0, name, 0, num_rows(t.shape)),))
        for name, t in reader.tensors.items()
    ]


# Each damages a file and says whether it must be noticed: a flipped byte of the payload of a tensor need not be.


def truncate(rng: random.Random, path: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def grow(rng: random.Random, path: Path) -> None:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def flip_header(rng: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.randrange(1, 5)):
        data[rng.randrange(length)] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def edit_header(rng: random.Random, path: Path) -> None:
    """A number of a header replaced, a tensor doubled, its name or dtype changed."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    entry = rng.choice(entries)
    what = rng.randrange(6)
    if what == 0:
        entry["shape"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif what == 1:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif what == 2:
        entry["dtype"] = rng.choice(["F64", "F4", "", None, "BF16", 7])
    elif what == 3:
        header[rng.choice(["extra", "", "\n\x1b", "é" * 3000])] = dict(entry)
    elif what == 4:
        entry["data_offsets"] = rng.choice(entries)["data_offsets"][::-1]
    else:
        del header[rng.choice(list(header))]
    text = json.dumps(header)
    if rng.random() < 0.3:
        text = text[:-1] + "," + text[1:]
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data[8 + length :])


def edit_index(rng: random.Random, path: Path) -> None:
    index = path.parent / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    key = rng.choice(list(content["weight_map"]))
    what = rng.randrange(4)
    if what == 0:
        content["weight_map"][key] = rng.choice(PATHS)
    elif what == 1:
        content["weight_map"][key + "x"] = content["weight_map"].pop(key)
    elif what == 2:
        content = rng.choice([[], None, {"weight_map": []}, {"weight_map": {"a": 1}}, "x", {}])
    index.write_text(json.dumps(content) if what != 3 else json.dumps(content)[: rng.randrange(40)])


def remove(rng: random.Random, path: Path) -> None:
    del rng
    path.unlink()


def make_pipe(rng: random.Random, path: Path) -> None:
    del rng
    path.unlink()
    os.mkfifo(path)


def escape_link(rng: random.Random, path: Path) -> None:
    del rng
    outside = path.parent.parent / "outside"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


def flip_metadata(rng: random.Random, path: Path) -> None:
    metadata = path.parent / ".metadata"
    data = bytearray(metadata.read_bytes())
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.choice(
            [0x72, 0x6A, 0x58, 0x28, 0x52, 0x30, 0x2E, 0x94, rng.randrange(256)]
        )
    metadata.write_bytes(data)


def cut_metadata(rng: random.Random, path: Path) -> None:
    truncate(rng, path.parent / ".metadata")


def edit_metadata(rng: random.Random, path: Path) -> None:
    """A place or a number within it, replaced by one of another length, with the pickle itself left valid."""
    metadata = path.parent / ".metadata"
    data = metadata.read_bytes()
    if rng.random() < 0.5:
        name = rng.choice(["../__0_0.distcp", "/etc/passwd", "x" * 5000, "..", "\0", "nothing.distcp"]).encode()
        old = b"X" + (12).to_bytes(4, "little") + b"__0_0.distcp"
        data = data.replace(old, b"X" + len(name).to_bytes(4, "little") + name)
    else:
        old = b"X" + (6).to_bytes(4, "little") + b"length"
        value = rng.choice(
            [b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\x00", b"N", b"K\x00"]
        )
        at = data.index(old) + len(old)
        size = {0x4B: 2, 0x4D: 3, 0x4A: 5}[data[at]]
        data = data[:at] + value + data[at + size :]
    metadata.write_bytes(data)


def plant_metadata(rng: random.Random, path: Path) -> None:
    plant = Plant(path.parent.parent / "planted")
    metadata = path.parent / ".metadata"
    if rng.random() < 0.5:
        metadata.write_bytes(pickle.dumps(plant, protocol=rng.randrange(6)))
    else:
        # In front of the real content, as something that is thrown away again.
        code = pickle.dumps(plant, protocol=2)[2:-1]
        metadata.write_bytes(b"\x80\x02" + code + b"0" + metadata.read_bytes()[2:])


def plant_items(rng: random.Random, path: Path) -> None:
    """Planted code in place of tensors, and in the common state, which is not to be opened at all."""
    plant = path.parent.parent / "planted"
    for file in sorted(path.parent.glob("*.distcp")):
        data = file.read_bytes()
        torch.save(Plant(plant), path.parent.parent / "item")
        item = (path.parent.parent / "item").read_bytes()
        copies = item * (len(data) // len(item) + 1)
        file.write_bytes(copies[: len(data)] if rng.random() < 0.5 else item.ljust(len(data)))


def flip_item(rng: random.Random, path: Path) -> None:
    """Damage to the frame of an item: the zip headers and the pickle."""
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 16):
        data[at + rng.randrange(16) if at + 16 < len(data) else at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


HF_DAMAGES = (truncate, grow, flip_header, edit_header, edit_header, edit_index, remove, make_pipe, escape_link)
DIST_DAMAGES = (
    truncate,
    flip_metadata,
    cut_metadata,
    edit_metadata,
    plant_metadata,
    plant_items,
    flip_item,
    remove,
    make_pipe,
    escape_link,
)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    torch.manual_seed(0)
    make_hf(folder / "hf")
    make_dist(folder / "dist", folder / "hf")
    return folder


def attempt(folder: Path, target: Path, opener: Callable[[Path], HfFolder | DistReader]) -> str:
    """Convert everything in a folder; the error, or "" when there was none."""
    try:
        with opener(folder) as reader:
            plan = whole(reader)
            with (
                staged(target, plan="fuzz", sources=[]) as stage,
                HfWriter(stage.folder, [t.spec for t in plan]) as writer,
            ):
                copy(plan, reader, writer)
                writer.finish()
    except BridgeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["hf", "dist"])
def test_damaged_inputs(tmp_path: Path, originals: Path, kind: str) -> None:
    opener = HfFolder if kind == "hf" else DistReader
    damages = HF_DAMAGES if kind == "hf" else DIST_DAMAGES
    suffix = ".safetensors" if kind == "hf" else ".distcp"
    (tmp_path / "work").mkdir()
    good = np.frombuffer(b"".join(p.read_bytes() for p in sorted((originals / kind).iterdir())), dtype=np.uint8)
    assert attempt(originals / kind, tmp_path / "good", opener) == "" and len(good)
    reference = (tmp_path / "good" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "good")
    noticed = 0
    for case in range(CASES):
        rng = random.Random(f"{kind} {case}")
        damage = damages[case % len(damages)]
        folder, target = tmp_path / "work" / "in", tmp_path / "work" / "out"
        shutil.copytree(originals / kind, folder)
        # The file that holds only the common state is not read at all.
        victims = sorted(folder.glob(f"*{suffix}"))[: 2 if kind == "hf" else -1]
        damage(rng, rng.choice(victims))
        peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        message = attempt(folder, target, opener)
        where = f"case {case}, {damage.__name__}"
        assert time.monotonic() - began < 5, where
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000, where
        assert message.isprintable() and len(message) < 1000, where
        assert not (tmp_path / "work" / "planted").exists(), where
        left = {p.name for p in (tmp_path / "work").iterdir()} - {"in", "outside", "item"}
        if message:
            noticed += 1
            assert left == set(), where
        else:
            # What goes unnoticed must have been harmless.
            assert left == {"out"}, where
            assert (target / "model.safetensors").read_bytes() == reference or damage is flip_item, where
            shutil.rmtree(target)
        shutil.rmtree(folder)
        (tmp_path / "work" / "outside").unlink(missing_ok=True)
        (tmp_path / "work" / "item").unlink(missing_ok=True)
    print(f"{noticed} of {CASES}")
    assert noticed >= CASES * 0.8
