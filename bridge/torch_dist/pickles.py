"""Pickles as inert trees: what `.metadata` and the head of an item are, read and written without executing anything.

`loads` is an interpreter of the few opcodes that such files consist of. It imports nothing, calls nothing and hashes
nothing from the file: a class or function becomes a `Global`, a call a `Call`, an object a `New` with its state. The
standard Unpickler with an allow-list would not do: a flipped byte in a memo index makes it allocate gigabytes, and a
nested tuple as a dictionary key makes it hash for ever. `dumps` writes such trees, so that torch need not be imported.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridge.errors import CheckpointError
from bridge.hf.tensors import printable

_MAX_STACK = 1_000_000


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
class New:
    """An instance of a class, never made. `state` is usually a dictionary of its fields."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(slots=True, eq=False)
class Persistent:
    """A reference to something outside the pickle: the storage of a tensor."""

    pid: Any


@dataclass(slots=True, eq=False)
class Pairs:
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
    def __init__(self, data: bytes, allowed: Callable[[str, str], bool], where: str) -> None:
        self.data, self.allowed, self.where = data, allowed, where
        self.memo: dict[int, Any] = {}

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {text}")

    def make_global(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            raise self.fail("damaged pickle")
        if not self.allowed(module, name):
            raise self.fail(
                f"its pickle names {printable(module + '.' + name)}, which no checkpoint needs: refused as unsafe"
            )
        return Global(module, name)

    def run(self) -> Any:
        # One branch an opcode, roughly in the order of how often they occur.
        data, memo = self.data, self.memo
        stack: list[Any] = []
        pos = 0

        def take(count: int) -> bytes:
            nonlocal pos
            if count < 0 or pos + count > len(data):
                raise self.fail("truncated pickle")
            pos += count
            return data[pos - count : pos]

        def line() -> str:
            nonlocal pos
            end = data.index(b"\n", pos)
            text = data[pos:end].decode("utf-8")
            pos = end + 1
            return text

        def since_mark() -> list[Any]:
            index = len(stack) - 1
            while stack[index] is not _MARK:
                index -= 1
                if index < 0:
                    raise self.fail("damaged pickle")
            items = stack[index + 1 :]
            del stack[index:]
            return items

        def pop() -> Any:
            value = stack.pop()
            if value is _MARK:
                raise self.fail("damaged pickle")
            return value

        while True:
            op = data[pos]
            pos += 1
            if op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif op == 0x68:  # BINGET
                stack.append(memo[data[pos]])
                pos += 1
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[int.from_bytes(take(4), "little")])
            elif op == 0x4B:  # BININT1
                stack.append(data[pos])
                pos += 1
            elif op == 0x4D:  # BININT2
                stack.append(int.from_bytes(take(2), "little"))
            elif op == 0x4A:  # BININT
                stack.append(int.from_bytes(take(4), "little", signed=True))
            elif op == 0x8A:  # LONG1
                stack.append(int.from_bytes(take(take(1)[0]), "little", signed=True))
            elif op == 0x28:  # MARK
                stack.append(_MARK)
            elif op == 0x71:  # BINPUT
                memo[take(1)[0]] = stack[-1]
            elif op == 0x72:  # LONG_BINPUT
                memo[int.from_bytes(take(4), "little")] = stack[-1]
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x85:  # TUPLE1
                stack.append((pop(),))
            elif op == 0x86:  # TUPLE2
                last = pop()
                stack.append((pop(), last))
            elif op == 0x87:  # TUPLE3
                last, middle = pop(), pop()
                stack.append((pop(), middle, last))
            elif op == 0x74:  # TUPLE
                stack.append(tuple(since_mark()))
            elif op == 0x81:  # NEWOBJ
                args, cls = pop(), pop()
                if type(cls) is not Global or type(args) is not tuple:
                    raise self.fail("damaged pickle")
                stack.append(New(cls, args))
            elif op == 0x52:  # REDUCE
                args, func = pop(), pop()
                if type(func) is not Global or type(args) is not tuple:
                    raise self.fail("damaged pickle")
                stack.append(Call(func, args))
            elif op == 0x62:  # BUILD
                state = pop()
                if type(stack[-1]) not in (New, Call):
                    raise self.fail("damaged pickle")
                stack[-1].state = state
            elif op == 0x7D:  # EMPTY_DICT
                stack.append(Pairs([]))
            elif op == 0x73:  # SETITEM
                value, key = pop(), pop()
                self.items_of(stack[-1]).append((key, value))
            elif op == 0x75:  # SETITEMS
                items = since_mark()
                if len(items) % 2:
                    raise self.fail("damaged pickle")
                self.items_of(stack[-1]).extend(zip(items[::2], items[1::2], strict=True))
            elif op == 0x5D:  # EMPTY_LIST
                stack.append([])
            elif op == 0x61:  # APPEND
                value = pop()
                self.list_of(stack[-1]).append(value)
            elif op == 0x65:  # APPENDS
                items = since_mark()
                self.list_of(stack[-1]).extend(items)
            elif op == 0x8C:  # SHORT_BINUNICODE
                stack.append(take(take(1)[0]).decode("utf-8"))
            elif op == 0x58:  # BINUNICODE
                stack.append(take(int.from_bytes(take(4), "little")).decode("utf-8"))
            elif op == 0x93:  # STACK_GLOBAL
                name, module = pop(), pop()
                stack.append(self.make_global(module, name))
            elif op == 0x63:  # GLOBAL
                module = line()
                stack.append(self.make_global(module, line()))
            elif op == 0x51:  # BINPERSID
                stack.append(Persistent(pop()))
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x88:  # NEWTRUE
                stack.append(True)
            elif op == 0x89:  # NEWFALSE
                stack.append(False)
            elif op == 0x47:  # BINFLOAT
                stack.append(struct.unpack(">d", take(8))[0])
            elif op == 0x95:  # FRAME
                take(8)
            elif op == 0x80:  # PROTO
                if take(1)[0] > 5:
                    raise self.fail("pickle of an unknown protocol")
            elif op == 0x2E:  # STOP
                if len(stack) != 1:
                    raise self.fail("damaged pickle")
                return pop()
            else:
                raise self.fail(f"its pickle uses the opcode 0x{op:02x}, which no checkpoint needs")
            if len(stack) > _MAX_STACK:
                raise self.fail("pickle nested too deep")

    def items_of(self, value: Any) -> list[tuple[Any, Any]]:
        if type(value) is not Pairs:
            raise self.fail("damaged pickle")
        return value.items

    def list_of(self, value: Any) -> list[Any]:
        if type(value) is not list:
            raise self.fail("damaged pickle")
        return value


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
    elif isinstance(value, Pairs | dict):
        items = value.items if isinstance(value, Pairs) else list(value.items())
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
    elif isinstance(value, New | Call):
        _emit(value.cls if isinstance(value, New) else value.func, out)
        _emit(value.args, out)
        out += b"\x81" if isinstance(value, New) else b"R"
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
