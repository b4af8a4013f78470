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
from recipes.data.garbage import seldom_collected
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
            gc.freeze()  # what is there now stays
            connection.send("ready")
            with seldom_collected():
                while True:
                    question = connection.recv()
                    try:
                        connection.send((answer(question), None))
                    except (BridgeError, OSError) as error:
                        connection.send((None, error))
        except (EOFError, ConnectionError):
            pass  # the run has ended, or was killed


if __name__ == "__main__":
    main()
