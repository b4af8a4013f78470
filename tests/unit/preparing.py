"""A preparation that is killed at a definite point: `python -m tests.unit.preparing DATA MODEL CACHE WORKERS AT WHERE`.

WHERE: `record`, when AT records are done; `join`, while the parts are put together; `made`, when the cache has its name
and the parts are still there. AT 0: not killed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from recipes.data import CorpusOptions, cache, corpus, open_corpus, tokenising


def killed(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(path: str, model: str, folder: str, workers: str, at: str, where: str) -> None:
    cache._PART_RECORDS = 16
    tokenising._ALONE_S, tokenising._GROUP_BLOCKS = 0.0, 1
    if where == "join":
        cache._append = killed
    if where == "made":
        corpus.shutil.rmtree = killed  # type: ignore[attr-defined]

    def progress(read: int, share: float) -> None:
        if where == "record" and read >= int(at) > 0:
            killed()

    options = CorpusOptions(path, 256, on_error="skip", workers=int(workers), cache=folder)
    print(open_corpus(options, Path(model), progress=progress).folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
