"""Commands without their imports: `gemma4-bridge …` in a process forked from one that has imported torch and Megatron.

Importing them takes longer than most commands do on a toy. `CommandServer.bin` is a folder to put in front of PATH. The
`gemma4-bridge` in it hands its arguments, folder, environment and standard streams to the server, passes signals on,
and ends as the command does. Everything but the imports is what the installed command does.
"""

from __future__ import annotations

import array
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
from pathlib import Path

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


class CommandServer:
    """The process that commands are forked from. A context manager; `bin` is the folder with `gemma4-bridge`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="commands")
        self.bin = Path(self._folder.name) / "bin"
        self.bin.mkdir()
        address = str(Path(self._folder.name) / "socket")
        command = self.bin / "gemma4-bridge"
        command.write_text(_CLIENT.format(python=sys.executable, address=address))
        command.chmod(0o755)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.functional.command_server", address],
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


def _received(connection: socket.socket) -> tuple[dict[str, object], list[int]]:
    streams = array.array("i")
    header, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * streams.itemsize))
    streams.frombytes(ancillary[0][2])
    length = struct.unpack("I", header)[0]
    return json.loads(connection.recv(length, socket.MSG_WAITALL)), list(streams)


def _command(request: dict[str, object], streams: list[int]) -> None:
    """Run one command, as its own process would, in this process; never returns."""
    code: object = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.closerange(3, max(streams) + 1)
        os.environ.clear()
        os.environ.update(request["env"])  # type: ignore[call-overload]
        os.chdir(str(request["cwd"]))
        sys.argv = list(request["argv"])  # type: ignore[call-overload]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        importlib.import_module("bridge.cli").main()
        code = 0
    except SystemExit as error:
        code = 0 if error.code is None else error.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _answer(connection: socket.socket) -> None:
    """One connection: fork the command, tell its pid and then how it ended."""
    request, streams = _received(connection)
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
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
