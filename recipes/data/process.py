"""One of `recipes.data.processes`: nothing imports this, it is run."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from bridge.errors import BridgeError
from recipes.helper_signals import unheard


def main() -> None:
    """One of the processes: `argv[1]` is the descriptor of its pipe."""
    unheard()
    # There is a process for each core: none of them needs threads.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    with Connection(int(sys.argv[1])) as connection:
        try:
            path, module, settings = connection.recv()
            sys.path[:] = path
            answer: Callable[[Any], Any] = importlib.import_module(module).opened(*settings)
            # What is there now stays, and records make no circles: garbage need not be looked for often.
            gc.freeze()
            gc.set_threshold(50_000)
            connection.send("ready")
            while True:
                question = connection.recv()
                try:
                    connection.send((answer(question), None))
                except (BridgeError, OSError) as error:
                    connection.send((None, error))
        except (EOFError, BrokenPipeError):
            pass


if __name__ == "__main__":
    main()
