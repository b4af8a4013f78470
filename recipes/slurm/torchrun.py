"""torchrun on one node of a job: `python -m recipes.slurm.torchrun RANKS PROGRAM [ARGUMENT]...`, one task per node.

Slurm says which node this is and where the first one is. Its signals reach the ranks themselves, which save: torchrun's
agent, which would end them half a minute later, does not listen to them. Where ranks have left with code 75, which the
agent calls a failure like any other, so does this.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from recipes.train.signals import STOP_SIGNALS, STOPPED


def main(words: Sequence[str]) -> int:
    """Run the ranks of this node; the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from recipes.train.rendezvous import port_of

    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    env, (ranks, *program) = os.environ, words
    options = {
        "nnodes": env.get("SLURM_STEP_NUM_NODES", "1"),
        "node-rank": env.get("SLURM_NODEID", "0"),
        "nproc-per-node": ranks,
        "master-addr": env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"),
        "master-port": port_of(env),
        "signals-to-handle": "SIGINT",
    }
    try:
        run.main([*(f"--{name}={value}" for name, value in options.items()), "--no-python", *program])
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        print(f"rank {first.local_rank} of this node: exit code {first.exitcode}", file=sys.stderr, flush=True)
        return STOPPED if first.exitcode == STOPPED else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
