"""Pickles as inert trees: what `.metadata` and the head of an item are, read and written without executing anything.

`loads` is an interpreter of the few opcodes that such files consist of. It imports nothing, calls nothing and hashes
nothing from the file: a class or function becomes a `Global`, a call a `Call`, an object an `Instance` with its state.
The standard Unpickler with an allow-list would not do: a flipped byte in a memo index makes it allocate gigabytes, and
a nested tuple as a dictionary key makes it hash for ever. `dumps` writes such trees: torch need not be imported.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from bridge.errors import CheckpointError
from bridge.hf.tensors import printable

_MAX_STACK = 1_000_000
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or constant by its name; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """`func(*args)`, not called. `state` is what was to be set on the result."""

    func: Global
    args: tuple[Any, ...]
    state: Any = None


@dataclass(slots=True, eq=False)
class Instance:
    """An instance of a class, never made. `state` is usually a dictionary of its fields."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(slots=True, eq=False)
class Persistent:
    """A reference to something outside the pickle: the storage of a tensor."""

    pid: Any


@dataclass(slots=True, eq=False)
class DictItems:
    """A dictionary as its items, because keys from a file are not to be hashed."""

    items: list[tuple[Any, Any]]

    def strings(self) -> dict[str, Any]:
        """The items whose key is a string."""
        return {key: value for key, value in self.items if type(key) is str}


class _Mark:
    pass


_MARK = _Mark()


def loads(data: bytes, allowed: Callable[[str, str], bool], where: str) -> Any:
    """Read a pickle into a tree of Global, Call, New, Persistent, Pairs, list, tuple and plain values.

    Raises CheckpointError, starting with `where`: the pickle is damaged, names something that is not `allowed(module,
    name)`, or uses an opcode that such files do not need.
    """
    try:
        return _Interpreter(data, allowed, where).run()
    except (
        IndexError,
        KeyError,
        struct.error,
        UnicodeDecodeError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
    ):
        raise CheckpointError(f"{where}: damaged pickle") from None


class _Interpreter:
    """A stack machine over the opcodes of `_OPCODES`; each is a method that takes its operands from `data`."""

    def __init__(self, data: bytes, allowed: Callable[[str, str], bool], where: str) -> None:
        self.data, self.allowed, self.where = data, allowed, where
        self.memo: dict[int, Any] = {}
        self.stack: list[Any] = []
        self.pos = 0

    def run(self) -> Any:
        while True:
            opcode = self.data[self.pos]
            self.pos += 1
            if opcode == _STOP:
                break
            operation = _OPCODES.get(opcode)
            if operation is None:
                raise self.fail(f"its pickle uses the opcode 0x{opcode:02x}, which no checkpoint needs")
            operation(self)
            if len(self.stack) > _MAX_STACK:
                raise self.fail("pickle nested too deep")
        if len(self.stack) != 1:
            raise self.fail("damaged pickle")
        return self.pop()

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {text}")

    def take(self, count: int) -> bytes:
        if count < 0 or self.pos + count > len(self.data):
            raise self.fail("truncated pickle")
        self.pos += count
        return self.data[self.pos - count : self.pos]

    def integer(self, size: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self) -> str:
        end = self.data.index(b"\n", self.pos)
        text = self.data[self.pos : end].decode("utf-8")
        self.pos = end + 1
        return text

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise self.fail("damaged pickle")
        return value

    def since_mark(self) -> list[Any]:
        index = len(self.stack) - 1
        while self.stack[index] is not _MARK:
            index -= 1
            if index < 0:
                raise self.fail("damaged pickle")
        items = self.stack[index + 1 :]
        del self.stack[index:]
        return items

    def top(self, kind: type[T]) -> T:
        value = self.stack[-1]
        if type(value) is not kind:
            raise self.fail("damaged pickle")
        return value

    def push_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def push_global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.fail("damaged pickle")
        if not self.allowed(module, name):
            raise self.fail(
                f"its pickle names {printable(module + '.' + name)}, which no checkpoint needs: refused as unsafe"
            )
        self.stack.append(Global(module, name))

    def push_named_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def push_applied(self, kind: type[Instance] | type[Call]) -> None:
        args, what = self.pop(), self.pop()
        if type(what) is not Global or type(args) is not tuple:
            raise self.fail("damaged pickle")
        self.stack.append(kind(what, args))

    def set_state(self) -> None:
        state = self.pop()
        if type(self.stack[-1]) not in (Instance, Call):
            raise self.fail("damaged pickle")
        self.stack[-1].state = state

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.top(DictItems).items.append((key, value))

    def set_items(self) -> None:
        items = self.since_mark()
        if len(items) % 2:
            raise self.fail("damaged pickle")
        self.top(DictItems).items.extend(zip(items[::2], items[1::2], strict=True))

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def extend(self) -> None:
        items = self.since_mark()
        self.top(list).extend(items)

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def skip_frame(self) -> None:
        self.take(8)

    def check_protocol(self) -> None:
        if self.integer(1) > 5:
            raise self.fail("pickle of an unknown protocol")


_STOP = 0x2E
_OPCODES: dict[int, Callable[[_Interpreter], None]] = {
    0x94: lambda pickle: pickle.memoize(len(pickle.memo)),  # MEMOIZE
    0x71: lambda pickle: pickle.memoize(pickle.integer(1)),  # BINPUT
    0x72: lambda pickle: pickle.memoize(pickle.integer(4)),  # LONG_BINPUT
    0x68: lambda pickle: pickle.stack.append(pickle.memo[pickle.integer(1)]),  # BINGET
    0x6A: lambda pickle: pickle.stack.append(pickle.memo[pickle.integer(4)]),  # LONG_BINGET
    0x4B: lambda pickle: pickle.stack.append(pickle.integer(1)),  # BININT1
    0x4D: lambda pickle: pickle.stack.append(pickle.integer(2)),  # BININT2
    0x4A: lambda pickle: pickle.stack.append(pickle.integer(4, signed=True)),  # BININT
    0x8A: lambda pickle: pickle.stack.append(pickle.integer(pickle.integer(1), signed=True)),  # LONG1
    0x47: lambda pickle: pickle.stack.append(struct.unpack(">d", pickle.take(8))[0]),  # BINFLOAT
    0x4E: lambda pickle: pickle.stack.append(None),  # NONE
    0x88: lambda pickle: pickle.stack.append(True),  # NEWTRUE
    0x89: lambda pickle: pickle.stack.append(False),  # NEWFALSE
    0x8C: lambda pickle: pickle.stack.append(pickle.take(pickle.integer(1)).decode("utf-8")),  # SHORT_BINUNICODE
    0x58: lambda pickle: pickle.stack.append(pickle.take(pickle.integer(4)).decode("utf-8")),  # BINUNICODE
    0x28: lambda pickle: pickle.stack.append(_MARK),  # MARK
    0x29: lambda pickle: pickle.stack.append(()),  # EMPTY_TUPLE
    0x85: lambda pickle: pickle.push_tuple(1),  # TUPLE1
    0x86: lambda pickle: pickle.push_tuple(2),  # TUPLE2
    0x87: lambda pickle: pickle.push_tuple(3),  # TUPLE3
    0x74: lambda pickle: pickle.stack.append(tuple(pickle.since_mark())),  # TUPLE
    0x5D: lambda pickle: pickle.stack.append([]),  # EMPTY_LIST
    0x61: _Interpreter.append,  # APPEND
    0x65: _Interpreter.extend,  # APPENDS
    0x7D: lambda pickle: pickle.stack.append(DictItems([])),  # EMPTY_DICT
    0x73: _Interpreter.set_item,  # SETITEM
    0x75: _Interpreter.set_items,  # SETITEMS
    0x63: lambda pickle: pickle.push_global(pickle.line(), pickle.line()),  # GLOBAL
    0x93: _Interpreter.push_named_global,  # STACK_GLOBAL
    0x81: lambda pickle: pickle.push_applied(Instance),  # NEWOBJ
    0x52: lambda pickle: pickle.push_applied(Call),  # REDUCE
    0x62: _Interpreter.set_state,  # BUILD
    0x51: lambda pickle: pickle.stack.append(Persistent(pickle.pop())),  # BINPERSID
    0x95: _Interpreter.skip_frame,  # FRAME
    0x80: _Interpreter.check_protocol,  # PROTO
}


def dumps(tree: Any) -> bytes:
    """Write a tree of Global, Call, New, Persistent, dict, list, tuple, str, int, float, bool and None. Protocol 2."""
    out = bytearray(b"\x80\x02")
    _emit(tree, out)
    return bytes(out + b".")


def _emit(value: Any, out: bytearray) -> None:
    if value is None:
        out += b"N"
    elif value is True:
        out += b"\x88"
    elif value is False:
        out += b"\x89"
    elif isinstance(value, int):
        _emit_int(value, out)
    elif isinstance(value, float):
        out += b"G" + struct.pack(">d", value)
    elif isinstance(value, str):
        data = value.encode("utf-8")
        out += b"X" + len(data).to_bytes(4, "little") + data
    elif isinstance(value, tuple):
        out += b"("
        for item in value:
            _emit(item, out)
        out += b"t"
    elif isinstance(value, list):
        out += b"](" if value else b"]"
        for item in value:
            _emit(item, out)
        out += b"e" if value else b""
    elif isinstance(value, DictItems | dict):
        items = value.items if isinstance(value, DictItems) else list(value.items())
        out += b"}(" if items else b"}"
        for key, item in items:
            _emit(key, out)
            _emit(item, out)
        out += b"u" if items else b""
    elif isinstance(value, Global):
        out += f"c{value.module}\n{value.name}\n".encode()
    elif isinstance(value, Persistent):
        _emit(value.pid, out)
        out += b"Q"
    elif isinstance(value, Instance | Call):
        _emit(value.cls if isinstance(value, Instance) else value.func, out)
        _emit(value.args, out)
        out += b"\x81" if isinstance(value, Instance) else b"R"
        if value.state is not None:
            _emit(value.state, out)
            out += b"b"
    else:
        raise CheckpointError(f"a value of the type {type(value).__name__} cannot be stored in a checkpoint")


def _emit_int(value: int, out: bytearray) -> None:
    if 0 <= value < 256:
        out += b"K" + value.to_bytes(1, "little")
    elif 0 <= value < 65536:
        out += b"M" + value.to_bytes(2, "little")
    elif -(2**31) <= value < 2**31:
        out += b"J" + value.to_bytes(4, "little", signed=True)
    else:
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        if len(data) > 255:
            raise CheckpointError("an integer of more than 255 bytes cannot be stored in a checkpoint")
        out += b"\x8a" + len(data).to_bytes(1, "little") + data
