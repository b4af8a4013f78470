"""Starts processes that measure one case each (`benchmarks.case_process`), the next one while a case runs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from benchmarks.case import Case
from benchmarks.lines import MEMORY, append, rows_of

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "-W", "ignore", "-m", "benchmarks.case_process")
# Seconds that imports may take, on a machine that is busy with a case.
READY_SECONDS = 180.0
# Below this a case on a GPU shows nothing: its weights, and what is compiled for it.
LEAST_SECONDS = 20.0
NO_TIME = "not run: no time left"


@dataclass(frozen=True)
class Request:
    """What to measure. `name`: of its lines; `out`: the file they go to; `seconds`: all that it may take."""

    name: str
    case: Case
    out: Path
    seconds: float = math.inf
    profile: bool = True

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self) | {"out": str(self.out), "seconds": min(self.seconds, 1e9)})

    @staticmethod
    def from_json(text: str) -> Request:
        said = json.loads(text)
        return Request(**said | {"case": Case(**said["case"]), "out": Path(said["out"])})


class Workers:
    """Processes that run cases in turn. What they print goes to `log`. Use it as a context: it ends them all.

    `end`: on the monotonic clock, when the last case has to be over. A case that would have fewer than `least` seconds
    is not begun.
    """

    def __init__(
        self, log: Path, end: float = math.inf, least: float = LEAST_SECONDS, command: Sequence[str] = COMMAND
    ) -> None:
        self._log = log.open("a", encoding="utf-8")
        self._end, self._least, self._command = end, least, command
        self._spare: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._spare is not None:
            _end(self._spare)
        self._log.close()

    def prepare(self) -> None:
        """Start the process of the next case, if it is not started yet."""
        self._spare = self._spare or self._start()

    def run(self, request: Request, another: bool = False) -> str:
        """Have a case measured; its status. `another`: start the next process as soon as this one has its case.

        A case that is over its seconds is killed with all that it started: compilers hold its memory too.
        """
        append(request.out, request.name, "asked", **asdict(request.case))
        if self._left(request) < self._least:
            return self._leave_out(request)
        self.prepare()
        process = self._spare
        assert process is not None and process.stdin is not None and process.stdout is not None
        ready = _is_ready(process.stdout, min(READY_SECONDS, self._left(request)))
        if ready and self._left(request) < self._least:
            return self._leave_out(request)
        self._spare = None
        reason: str | None = None
        try:
            if not ready:
                reason = f"failed: its process did not start; {self._log.name} says more"
            else:
                if another:
                    self.prepare()
                request = replace(request, seconds=self._left(request))
                process.stdin.write(request.to_json().encode() + b"\n")
                process.stdin.flush()
                code = process.wait(min(request.seconds, 1e6))
                reason = f"failed: exit code {code}; {self._log.name} says more" if code else None
        except subprocess.TimeoutExpired:
            reason = f"failed: not done after {request.seconds:.0f} s"
        except BrokenPipeError:
            reason = f"failed: exit code {process.wait()}; {self._log.name} says more"
        finally:
            _end(process)
        if reason is not None:
            append(request.out, request.name, "killed", status=reason)
        return str(rows_of(request.out)[request.name]["status"])

    def _left(self, request: Request) -> float:
        return min(request.seconds, self._end - time.monotonic())

    def _leave_out(self, request: Request) -> str:
        append(request.out, request.name, "left out", **asdict(request.case), status=NO_TIME)
        return NO_TIME

    def _start(self) -> subprocess.Popen[bytes]:
        # Without it long rows fail of fragments.
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        # A group of its own, so that it ends with its compilers; no session of its own, which would outlive this one.
        return subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            process_group=0,
        )


def run_rungs(
    workers: Workers,
    name: str,
    rungs: Sequence[Case],
    out: Path,
    seconds: float,
    *,
    profile: bool = True,
    another: bool = False,
) -> str:
    """The first of `rungs` that does not run out of memory, in `seconds` for all of them; its status."""
    status, start = MEMORY, time.monotonic()
    for i, rung in enumerate(rungs):
        left = seconds - (time.monotonic() - start)
        if i and left < LEAST_SECONDS:
            break
        status = workers.run(Request(name, rung, out, left, profile), another or i + 1 < len(rungs))
        if status != MEMORY:
            break
    return status


def _is_ready(output: IO[bytes], seconds: float) -> bool:
    """Whether the process says so in time."""
    end = time.monotonic() + seconds
    said = b""
    while not said.endswith(b"ready\n"):
        if not select.select([output], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        if not (part := os.read(output.fileno(), 1024)):
            return False
        said += part
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """With all of its group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(BrokenPipeError):
                stream.close()
