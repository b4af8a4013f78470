"""Rewards of many answers, each within a time limit: what raises, hangs or ends its process costs its row alone."""

from __future__ import annotations

import json
import math
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any

from bridge.errors import TrainingError
from recipes.data.threads import ordered_map
from recipes.helper_signals import held_back
from recipes.rewards.named import RewardOptions


@dataclass(frozen=True)
class Judged:
    """`answer` is what the model said, `reference` what the record has, which `where` names."""

    answer: str
    reference: str
    where: str


class Judge:
    """A process that computes rewards, started where it is needed. `timeout`: seconds for one reward of one answer."""

    def __init__(self, options: RewardOptions, timeout: float) -> None:
        self._options, self._timeout = options, timeout
        self._process: subprocess.Popen[bytes] | None = None

    def value(self, reward: int, row: Judged) -> tuple[float, str]:
        """A reward and "", or NaN and what went wrong. Raises TrainingError where no process can be started."""
        name = self._options.names[reward]
        process = self._started()
        reply = _ask(process, {"reward": reward, **asdict(row)}, self._timeout)
        if reply is None:
            code = process.poll()
            self.close()
            why = f"takes more than {self._timeout:g} s (grpo.reward_timeout)"
            if code is not None:
                why = f"ends its process (code {code})"
            return math.nan, f"{row.where}: {name} {why}"
        return (reply["value"], "") if "value" in reply else (math.nan, str(reply["error"]))

    def close(self) -> None:
        """End the process; the next reward starts another."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # Without the folder it stands in before everything else: a user's file may be named as a module of Python's.
        command = [sys.executable, "-P", "-m", "recipes.rewards.worker"]
        with held_back():
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        # What modules do when they are imported has no limit.
        reply = _ask(self._process, asdict(self._options), None)
        if reply is None or "error" in reply:
            self.close()
            raise TrainingError(
                f"grpo.rewards: their process does not start ({(reply or {}).get('error', 'it ended')})"
            )
        return self._process


def _ask(process: subprocess.Popen[bytes], said: dict[str, Any], timeout: float | None) -> dict[str, Any] | None:
    """The reply; None where none came in time, or none will."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(said).encode() + b"\n")
    except BrokenPipeError:
        process.wait()
        return None
    ready, _, _ = select.select([process.stdout], [], [], timeout)
    line = process.stdout.readline() if ready else b""
    if ready and not line:
        process.wait()
    found: dict[str, Any] | None = json.loads(line) if line else None
    return found


class Judges:
    """Several of them at work. `notify` gets what went wrong first with each reward, once."""

    def __init__(
        self, options: RewardOptions, timeout: float, workers: int, notify: Callable[[str], None] = lambda line: None
    ) -> None:
        self._options, self._workers, self._notify = options, workers, notify
        self._idle: SimpleQueue[Judge] = SimpleQueue()
        self._all = [Judge(options, timeout) for _ in range(workers)]
        for judge in self._all:
            self._idle.put(judge)
        self._said: set[int] = set()
        self._lock = threading.Lock()

    def values(self, rows: Sequence[Judged]) -> list[list[float]]:
        """[rows][rewards], NaN where there is none."""
        return list(ordered_map(self._of, rows, workers=self._workers, ahead=2 * self._workers))

    def _of(self, row: Judged) -> list[float]:
        judge = self._idle.get()
        try:
            found = [judge.value(reward, row) for reward in range(len(self._options.names))]
        finally:
            self._idle.put(judge)
        with self._lock:
            for reward, (_, wrong) in enumerate(found):
                if wrong and reward not in self._said:
                    self._said.add(reward)
                    self._notify(f"{wrong}; such answers are not learnt from (said once; the log counts them)")
        return [value for value, _ in found]

    def close(self) -> None:
        """End the processes."""
        for judge in self._all:
            judge.close()
