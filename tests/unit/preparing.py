"""Preparations that are killed at definite points: `python -m tests.unit.preparing DATA MODEL CACHE KILLS`.

KILLS is JSON: [workers, records, step] of each, one after another, each in a process of its own, which is killed when
so many records are done and then, before one of the calls of `STEPS`: the number `step` of them from there on (0: at
once), or the first of that name; of no records, from the beginning on. Prints how each ended, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import CodeType
from typing import Any

from recipes.data import CorpusOptions, cache, corpus, open_corpus, tokenising
from recipes.data.processes import Processes

# What changes anything on the disk, in the modules that write parts and put them together.
STEPS = {"mkdir", "mkdtemp", "open", "write", "close", "write_text", "rename", "rmtree"}
_WRITERS = {str(cache.__file__), str(corpus.__file__)}


class Kill:
    """The end of this process, when `due` was called with so many records and `step` has come."""

    def __init__(self, records: int, step: int | str) -> None:
        self._records, self._step, self._steps, self._due = records, step, 0, not records
        monitoring = sys.monitoring
        monitoring.use_tool_id(monitoring.DEBUGGER_ID, "kill")
        monitoring.register_callback(monitoring.DEBUGGER_ID, monitoring.events.CALL, self._called)
        monitoring.set_events(monitoring.DEBUGGER_ID, monitoring.events.CALL)

    def due(self, read: int, share: float) -> None:
        """So many records are done."""
        self._due = self._due or read >= self._records
        if self._due and self._step == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _called(self, code: CodeType, offset: int, function: object, first: object) -> Any:
        name = getattr(function, "__name__", "")
        if code.co_filename not in _WRITERS or name not in STEPS:
            return sys.monitoring.DISABLE
        if self._due:
            self._steps += 1
            if self._step in (name, self._steps):
                os.kill(os.getpid(), signal.SIGKILL)
        return None


def prepare(path: str, model: str, folder: str, workers: int, records: int, step: int | str) -> None:
    # A part is a number of records and nothing else: not what a slow machine does in some seconds.
    cache._PART_RECORDS, cache._PART_SECONDS = 16, 1e9
    tokenising._ALONE_S, tokenising._GROUP_BATCHES = 0.0, 1
    # There is no telling how far this process gets until the others are ready: it waits for them.
    Processes.ready = True  # type: ignore[assignment,method-assign]
    options = CorpusOptions(path, 256, on_error="skip", workers=workers, cache=folder)
    open_corpus(options, Path(model), progress=Kill(records, step).due)


def main(path: str, model: str, folder: str, kills: str) -> None:
    # What the children would each import for themselves; and a fork has no threads.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoProcessor

    AutoProcessor.from_pretrained(model)
    ends: list[int] = []
    for workers, records, step in json.loads(kills):
        # Of a process with one thread, that has imported all there is and made nothing of it yet.
        child = os.fork()
        if not child:
            code = 1
            try:
                prepare(path, model, folder, workers, records, step)
                code = 0
            finally:
                os._exit(code)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
