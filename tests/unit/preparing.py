"""Preparations that are killed at definite points: `python -m tests.unit.preparing DATA MODEL CACHE KILLS`.

KILLS is JSON: [workers, at, where] of each, one after another, each in a process of its own. `where`: "record", when
`at` records are done; "join", while the parts are put together; "made", when the cache has its name and the parts are
still there. Prints how each ended, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from recipes.data import CorpusOptions, cache, corpus, open_corpus, tokenising
from recipes.data.processes import Processes


def killed(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(path: str, model: str, folder: str, workers: int, at: int, where: str) -> None:
    # A part is a number of records and nothing else: not what a slow machine does in some seconds.
    cache._PART_RECORDS, cache._PART_SECONDS = 16, 1e9
    tokenising._ALONE_S, tokenising._GROUP_BLOCKS = 0.0, 1
    # There is no telling how far this process gets until the others are ready: it waits for them.
    Processes.ready = True  # type: ignore[assignment,method-assign]
    if where == "join":
        cache._append = killed  # type: ignore[assignment]
    if where == "made":
        corpus.shutil.rmtree = killed  # type: ignore[attr-defined]

    def progress(read: int, share: float) -> None:
        if where == "record" and read >= at:
            killed()

    options = CorpusOptions(path, 256, on_error="skip", workers=workers, cache=folder)
    open_corpus(options, Path(model), progress=progress)


def main(path: str, model: str, folder: str, kills: str) -> None:
    # What the children would each import for themselves.
    from transformers import AutoTokenizer  # noqa: F401

    ends: list[int] = []
    for workers, at, where in json.loads(kills):
        # Of a process with one thread, that has imported all there is and made nothing of it yet.
        child = os.fork()
        if not child:
            code = 1
            try:
                prepare(path, model, folder, workers, at, where)
                code = 0
            finally:
                os._exit(code)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
