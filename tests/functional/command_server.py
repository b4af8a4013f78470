"""Commands without their imports: `gemma4-bridge …` in a process forked from one that has imported torch and Megatron.

Importing them takes longer than most commands do on a toy. `CommandServer.bin` is a folder to put in front of PATH. The
`gemma4-bridge` in it hands its arguments, folder, environment and standard streams to the server, passes signals on,
and ends as the command does. Everything but the imports is what the installed command does. `start` is the same for a
test that needs the command's process itself, or does something in it first.
"""

from __future__ import annotations

import array
import contextlib
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = ("bridge.cli", "bridge.lora.merge", "recipes.launch", "recipes.train.loop", "recipes.data.training", "peft")

_CLIENT = """#!{python} -ISE
import array, json, os, signal, socket, struct, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps(dict(argv=sys.argv, cwd=os.getcwd(), env=dict(os.environ))).encode()
streams = array.array("i", [0, 1, 2])
server.sendmsg([struct.pack("I", len(request))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
server.sendall(request)
pid = struct.unpack("i", server.recv(4, socket.MSG_WAITALL))[0]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: os.kill(pid, number))
code = struct.unpack("i", server.recv(4, socket.MSG_WAITALL))[0]
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@dataclass(frozen=True)
class Command:
    """A command that runs: its process, and the connection on which the server tells how that ends."""

    pid: int
    connection: socket.socket

    def wait(self, seconds: float) -> int:
        """Its exit code, or a signal's number, negative. One that takes longer is killed, and TimeoutError raised."""
        with self.connection:
            self.connection.settimeout(seconds)
            return int(struct.unpack("i", self.connection.recv(4, socket.MSG_WAITALL))[0])


class CommandServer:
    """The process that commands are forked from. A context manager; `bin` is the folder with `gemma4-bridge`.

    `within`: a command that runs it, `unshare` for mounts of its own.
    """

    def __init__(self, within: Sequence[str] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="commands")
        self.bin = Path(self._folder.name) / "bin"
        self.bin.mkdir()
        self._address = str(Path(self._folder.name) / "socket")
        command = self.bin / "gemma4-bridge"
        command.write_text(_CLIENT.format(python=sys.executable, address=self._address))
        command.chmod(0o755)
        self._process = subprocess.Popen(
            [*within, sys.executable, "-m", "tests.functional.command_server", self._address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def __enter__(self) -> CommandServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, arguments: Sequence[str], log: Path, before: str | None = None, **values: Any) -> Command:
        """`gemma4-bridge` with `arguments`, its output in the file `log`.

        `before`: `module:function`, which is called in its process with the `arguments` and `values` first.
        """
        request = {
            "argv": ["gemma4-bridge", *arguments],
            "cwd": str(Path.cwd()),
            "env": os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
            "before": before,
            "values": values,
        }
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        with Path(os.devnull).open("rb") as nothing, log.open("ab") as file:
            said = json.dumps(request).encode()
            streams = array.array("i", [nothing.fileno(), file.fileno(), file.fileno()])
            connection.sendmsg([struct.pack("I", len(said))], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
            connection.sendall(said)
            pid = struct.unpack("i", connection.recv(4, socket.MSG_WAITALL))[0]
        return Command(pid, connection)


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    streams = array.array("i")
    header, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(ancillary[0][2])
    length = struct.unpack("I", header)[0]
    return json.loads(connection.recv(length, socket.MSG_WAITALL)), list(streams)


def _command(request: dict[str, Any], streams: list[int]) -> None:
    """Run one command, as its own process would, in this process; never returns."""
    code: object = 1
    try:
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, max(streams) + 1)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = list(request["argv"])
        # Whoever started the tests in the background has it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if request.get("before"):
            module, _, function = request["before"].partition(":")
            getattr(importlib.import_module(module), function)(sys.argv[1:], **request["values"])
        importlib.import_module("bridge.cli").main()
        code = 0
    except SystemExit as error:
        code = 0 if error.code is None else error.code
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _answer(connection: socket.socket) -> None:
    """One connection: fork the command, tell its pid and then how it ended."""
    request, streams = _received(connection)
    pid = os.fork()
    if not pid:
        _command(request, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(struct.pack("i", pid))
    ended = os.pidfd_open(pid)
    if ended not in select.select([connection, ended], [], [])[0]:
        os.killpg(pid, signal.SIGKILL)  # the client is gone
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(struct.pack("i", code))


def _serve(address: str) -> None:
    from bridge.megatron import cpu_runtime
    from bridge.ranks import PRELOAD

    cpu_runtime.enable()
    for name in (*PRELOAD, *PRELOADED):
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no zombies are left of those that answer
    print("ready", flush=True)
    while True:
        connection = listener.accept()[0]
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            _answer(connection)
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    _serve(sys.argv[1])
