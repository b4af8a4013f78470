"""Processes of this machine that answer questions, one at a time each.

They are started anew (a copy of this one would have its threads' locks and its GPU), import what they need by name, and
end when the pipe to them is closed, however that comes about.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bridge.close_on_exit import CloseOnExit
from bridge.errors import DataError
from recipes.helper_signals import held_back

_LEAVE_S = 5.0


class ProcessDied(DataError):
    """One of the processes, of itself or by somebody else's hand."""


class Processes(CloseOnExit):
    """`size` processes, each with what `module.opened(*settings)` gives: a function of a question. Thread-safe.

    Questions, answers and settings are pickled. They take seconds to start, in which `ready` is false. A context
    manager; `close` ends the processes, whatever they are at.
    """

    def __init__(self, size: int, module: str, settings: tuple[Any, ...]) -> None:
        self._free: queue.SimpleQueue[tuple[Connection, subprocess.Popen[bytes]]] = queue.SimpleQueue()
        self._all: list[tuple[Connection, subprocess.Popen[bytes]]] = []
        self._greeted: set[subprocess.Popen[bytes]] = set()
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        for _ in range(size):
            ours, theirs = multiprocessing.Pipe()
            with held_back():
                process = subprocess.Popen(
                    [sys.executable, "-m", "recipes.data.process", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=os.environ | {"PYTHONPATH": path},
                )
            theirs.close()
            ours.send((sys.path, module, settings))
            self._all.append((ours, process))
            self._free.put((ours, process))

    @property
    def pids(self) -> list[int]:
        """Of the processes."""
        return [process.pid for _, process in self._all]

    @property
    def ready(self) -> bool:
        """Whether all of them wait for questions, or have died."""
        return all(connection.poll() for connection, _ in self._all)

    def ask(self, question: Any) -> Any:
        """What one of them answers, when one is free. Raises what it raised; ProcessDied."""
        connection, process = self._free.get()
        try:
            if process not in self._greeted:
                connection.recv()
                self._greeted.add(process)
            connection.send(question)
            answer, error = connection.recv()
        except (EOFError, OSError):
            code = process.wait(_LEAVE_S) if process.poll() is None else process.returncode
            raise ProcessDied(
                f"data.workers: a process that tokenises has died (code {code}; out of memory?); what the others have "
                "done is kept, and the same command goes on behind it"
            ) from None
        finally:
            self._free.put((connection, process))
        if error is not None:
            raise error
        return answer

    def close(self) -> None:
        for connection, process in self._all:
            connection.close()
            process.kill()
        for _, process in self._all:
            process.wait()
        self._all = []
