"""The item of a `.distcp` file: one tensor (or object) as `torch.save` writes it, made and taken apart without torch.

An item is a zip archive whose members are stored, not compressed: `data.pkl` (a pickle that says dtype, shape and
storage), `byteorder`, `version` and the storage `data/0`, whose bytes are the tensor. `torch.save` and `torch.load`
neither check nor need the CRC32 of the storage; here it is written, so that damage can be found.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bridge.errors import CheckpointError
from bridge.hf.tensors import ITEM_SIZES, printable
from bridge.torch_dist import pickles
from bridge.torch_dist.pickles import Call, Global, Persistent

# safetensors dtype -> (torch dtype, its storage class; None where torch stores it untyped)
DTYPES: dict[str, tuple[str, str | None]] = {
    "F64": ("float64", "DoubleStorage"),
    "F32": ("float32", "FloatStorage"),
    "F16": ("float16", "HalfStorage"),
    "BF16": ("bfloat16", "BFloat16Storage"),
    "I64": ("int64", "LongStorage"),
    "I32": ("int32", "IntStorage"),
    "I16": ("int16", "ShortStorage"),
    "I8": ("int8", "CharStorage"),
    "U8": ("uint8", "ByteStorage"),
    "BOOL": ("bool", "BoolStorage"),
    "U64": ("uint64", None),
    "U32": ("uint32", None),
    "U16": ("uint16", None),
    "F8_E4M3": ("float8_e4m3fn", None),
    "F8_E5M2": ("float8_e5m2", None),
}
DTYPE_OF_TORCH = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
_DTYPE_OF_STORAGE = {storage: name for name, (_, storage) in DTYPES.items() if storage}

# An item must stay addressable by the 32-bit fields of a zip.
MAX_ITEM_BYTES = 2**32 - 2**20
_UNTYPED = Global("torch.storage", "UntypedStorage")
_REBUILD = {2: Global("torch._utils", "_rebuild_tensor_v2"), 3: Global("torch._utils", "_rebuild_tensor_v3")}
_NO_HOOKS = Call(Global("collections", "OrderedDict"), ())
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<4sIQI")
_ALIGN = 64
# Enough for the directory of every item seen; a larger one is read by itself.
_TAIL_BYTES = 4096
_MAX_DIRECTORY = 1 << 20
_MAX_PICKLE = 1 << 20


@dataclass(frozen=True)
class TensorItem:
    """Where a tensor lies inside its item: `payload` in bytes from the item's start, `strides` in elements.

    `crc` is the CRC32 of the whole storage of `storage_bytes` bytes at `storage`, as the zip records it.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    payload: int
    storage: int
    storage_bytes: int
    crc: int


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor, as torch counts them."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    torch_name, storage = DTYPES[dtype]
    numel = math.prod(shape)
    strides = contiguous_strides(shape)
    if storage is None:
        # An untyped storage counts bytes, and the dtype is an argument of its own.
        pid = ("storage", _UNTYPED, "0", "cpu", numel * ITEM_SIZES[dtype])
        dtype_arg = Global("torch", torch_name)
        return pickles.dumps(Call(_REBUILD[3], (Persistent(pid), 0, shape, strides, False, _NO_HOOKS, dtype_arg)))
    pid = ("storage", Global("torch", storage), "0", "cpu", numel)
    return pickles.dumps(Call(_REBUILD[2], (Persistent(pid), 0, shape, strides, False, _NO_HOOKS)))


def _local_header(name: bytes, size: int, crc: int, offset: int, align: bool) -> bytes:
    """Header of a member that starts at `offset`; with `align` its data start at a multiple of 64 bytes."""
    extra = b""
    if align:
        start = offset + _LOCAL.size + len(name) + 4
        pad = -start % _ALIGN
        # The padding field that torch itself writes.
        extra = b"FB" + pad.to_bytes(2, "little") + b"Z" * pad
    return _LOCAL.pack(b"PK\3\4", 20, 0x0800, 0, 0, 0, crc, size, size, len(name), len(extra)) + name + extra


@lru_cache(maxsize=64)
def _frame(members: tuple[tuple[bytes, bytes], ...], payload_bytes: int | None) -> tuple[bytes, tuple[Any, ...]]:
    """The bytes before the payload (with a zero CRC), and what the rest needs."""
    head, entries = bytearray(), []
    for name, data in members:
        entries.append((name, len(data), zlib.crc32(data), len(head)))
        head += _local_header(name, len(data), zlib.crc32(data), len(head), True) + data
    if payload_bytes is not None:
        entries.append((b"archive/data/0", payload_bytes, 0, len(head)))
        head += _local_header(b"archive/data/0", payload_bytes, 0, len(head), True)
    return bytes(head), tuple(entries)


def _directory(entries: tuple[Any, ...], offset: int) -> bytes:
    out = bytearray()
    for name, size, crc, start in entries:
        out += _CENTRAL.pack(b"PK\1\2", 20, 20, 0x0800, 0, 0, 0, crc, size, size, len(name), 0, 0, 0, 0, 0, start)
        out += name
    size = len(out)
    return bytes(out + _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), size, offset, 0))


def _tensor_members(dtype: str, shape: tuple[int, ...]) -> tuple[tuple[bytes, bytes], ...]:
    return (
        (b"archive/data.pkl", _tensor_pickle(dtype, shape)),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    )


@lru_cache(maxsize=1024)
def item_sizes(dtype: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(bytes before the payload, payload, bytes behind it) of the item of a contiguous tensor."""
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    if nbytes > MAX_ITEM_BYTES:
        raise CheckpointError(f"a chunk of {nbytes} bytes does not fit into one item of a distributed checkpoint")
    head, entries = _frame(_tensor_members(dtype, shape), nbytes)
    return len(head), nbytes, len(_directory(entries, len(head) + nbytes))


def tensor_item(dtype: str, shape: tuple[int, ...], crc: int) -> tuple[bytes, bytes]:
    """(bytes before, bytes behind) the payload of a contiguous tensor whose bytes have this CRC32."""
    nbytes = math.prod(shape) * ITEM_SIZES[dtype]
    head, entries = _frame(_tensor_members(dtype, shape), nbytes)
    name, size, _, start = entries[-1]
    # In the local header the CRC follows signature, version, flags, method, time and date.
    head = head[: start + 14] + crc.to_bytes(4, "little") + head[start + 18 :]
    return head, _directory((*entries[:-1], (name, size, crc, start)), len(head) + nbytes)


def object_item(value: Any) -> bytes:
    """A whole item that `torch.load` reads as `value`: dict, list, tuple, str, int, float, bool, None."""
    members = (
        (b"archive/data.pkl", pickles.dumps(value)),
        (b"archive/byteorder", b"little"),
        (b"archive/version", b"3\n"),
    )
    head, entries = _frame(members, None)
    return head + _directory(entries, len(head))


def _allowed(module: str, name: str) -> bool:
    if (module, name) in _ITEM_GLOBALS:
        return True
    return module == "torch" and (name in _DTYPE_OF_STORAGE or name in DTYPE_OF_TORCH)


_ITEM_GLOBALS = {(g.module, g.name) for g in (*_REBUILD.values(), _UNTYPED)} | {("collections", "OrderedDict")}


def parse_item(read: Callable[[int, int], bytes], length: int, where: str) -> TensorItem:
    """Find the tensor inside an item of `length` bytes; `read(offset, nbytes)` reads from it.

    Raises CheckpointError, starting with `where`: not a zip, compressed, unsafe, not a plain strided tensor.
    """
    members = _members(read, length, where)
    root = next((name[: -len("data.pkl")] for name in members if name.endswith("/data.pkl")), None)
    if root is None:
        raise CheckpointError(f"{where}: not a saved tensor (it has no data.pkl)")
    start, size, _ = _locate(read, members[f"{root}data.pkl"], length, where)
    if size > _MAX_PICKLE:
        raise CheckpointError(f"{where}: not a saved tensor (its pickle has {size} bytes)")
    order = members.get(f"{root}byteorder")
    if order is not None:
        at, count, _ = _locate(read, order, length, where)
        if count != 6 or read(at, count) != b"little":
            raise CheckpointError(f"{where}: not in little-endian byte order")
    tree = pickles.loads(read(start, size), _allowed, where)
    return _tensor_of(tree, read, members, root, length, where)


def _naturals(value: Any) -> bool:
    return type(value) is tuple and all(type(item) is int and 0 <= item < 2**62 for item in value)


def _tensor_of(
    tree: Any, read: Callable[[int, int], bytes], members: dict[str, Any], root: str, length: int, where: str
) -> TensorItem:
    odd = CheckpointError(f"{where}: not a plain tensor")
    if not isinstance(tree, Call) or tree.func not in _REBUILD.values() or len(tree.args) not in (6, 7, 8):
        raise odd
    storage, offset, shape, strides = tree.args[:4]
    if isinstance(shape, Call) and shape.func == Global("torch", "Size") and len(shape.args) == 1:
        shape = shape.args[0]
    if not isinstance(storage, Persistent) or not _naturals((offset,)) or not _naturals(shape):
        raise odd
    pid = storage.pid
    if not _naturals(strides) or len(strides) != len(shape) or type(pid) is not tuple or len(pid) != 5:
        raise odd
    kind, key = pid[1], pid[2]
    if pid[0] != "storage" or not isinstance(kind, Global) or type(key) is not str:
        raise odd
    if kind == _UNTYPED:
        if len(tree.args) < 7 or not isinstance(tree.args[6], Global) or tree.args[6].name not in DTYPE_OF_TORCH:
            raise odd
        dtype = DTYPE_OF_TORCH[tree.args[6].name]
    elif kind.name in _DTYPE_OF_STORAGE:
        dtype = _DTYPE_OF_STORAGE[kind.name]
    else:
        raise odd
    member = members.get(f"{root}data/{key}")
    if member is None:
        raise CheckpointError(f"{where}: its storage {printable(key)} is not in the archive")
    start, size, crc = _locate(read, member, length, where)
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * ITEM_SIZES[dtype] > size:
        raise CheckpointError(f"{where}: its storage of {size} bytes is too short for the shape {shape}")
    return TensorItem(dtype, shape, strides, start + offset * ITEM_SIZES[dtype], start, size, crc)


def _members(read: Callable[[int, int], bytes], length: int, where: str) -> dict[str, tuple[int, int, int]]:
    """name -> (local header, bytes, CRC32) of a zip's members, from its central directory."""
    broken = CheckpointError(f"{where}: damaged archive")
    tail_start = max(0, length - _TAIL_BYTES)
    tail = read(tail_start, length - tail_start)
    end = tail.rfind(b"PK\5\6")
    if end < 0 or end + _END.size > len(tail):
        raise broken
    _, _, _, _, count, size, offset, _ = _END.unpack_from(tail, end)
    if end >= _LOCATOR64.size and tail[end - _LOCATOR64.size : end].startswith(b"PK\6\7"):
        at = _LOCATOR64.unpack_from(tail, end - _LOCATOR64.size)[2]
        if at + _END64.size > length:
            raise broken
        fields = _END64.unpack(read(at, _END64.size))
        if fields[0] != b"PK\6\6":
            raise broken
        count, size, offset = fields[7:]
    if size > _MAX_DIRECTORY or offset + size > length or count * _CENTRAL.size > size:
        raise broken
    directory = tail[offset - tail_start :][:size] if offset >= tail_start else read(offset, size)
    members: dict[str, tuple[int, int, int]] = {}
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > size:
            raise broken
        fields = _CENTRAL.unpack_from(directory, at)
        name_size, extra_size, comment_size = fields[10:13]
        name_at = at + _CENTRAL.size
        at = name_at + name_size + extra_size + comment_size
        if fields[0] != b"PK\1\2" or at > size:
            raise broken
        if fields[4] != 0 or fields[3] & 1:
            raise CheckpointError(f"{where}: a compressed or encrypted archive, which no checkpoint is")
        name = directory[name_at : name_at + name_size].decode("utf-8", "replace")
        if name in members:
            raise broken
        packed, unpacked, start = fields[8], fields[9], fields[16]
        extra = directory[name_at + name_size : name_at + name_size + extra_size]
        packed, unpacked, start = _wide_fields(extra, packed, unpacked, start)
        if packed != unpacked:
            raise broken
        members[name] = (start, packed, fields[7])
    return members


def _wide_fields(extra: bytes, packed: int, unpacked: int, start: int) -> tuple[int, int, int]:
    """The 64-bit values that replace fields of 0xffffffff, in their fixed order."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = [int.from_bytes(extra[i : i + 8], "little") for i in range(at + 4, at + 4 + size, 8)]
            if unpacked == 0xFFFFFFFF and wide:
                unpacked = wide.pop(0)
            if packed == 0xFFFFFFFF and wide:
                packed = wide.pop(0)
            if start == 0xFFFFFFFF and wide:
                start = wide.pop(0)
        at += 4 + size
    return packed, unpacked, start


def _locate(
    read: Callable[[int, int], bytes], member: tuple[int, int, int], length: int, where: str
) -> tuple[int, int, int]:
    """(first byte of the data, bytes, CRC32) of a member: its local header may be longer than the directory says."""
    start, size, crc = member
    if start + _LOCAL.size > length:
        raise CheckpointError(f"{where}: damaged archive")
    fields = _LOCAL.unpack(read(start, _LOCAL.size))
    data = start + _LOCAL.size + fields[9] + fields[10]
    if fields[0] != b"PK\3\4" or data + size > length:
        raise CheckpointError(f"{where}: damaged archive")
    return data, size, crc
