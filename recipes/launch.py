"""From a recipe's name to a run: the checks that need no packages first, then the loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bridge.errors import BridgeError
from recipes.check import check_startable
from recipes.config import load_recipe
from recipes.environment import rank_from_environment, world_size_from_environment
from recipes.train.signals import STOPPED, StopSignal
from recipes.train.sinks import check_sinks
from recipes.train.sole import sole_run

# Slurm kills what is left 30 s after it has asked. Seconds.
_PATIENCE = 5.0


def run_recipe(name: str, overrides: Sequence[str] = ()) -> int:
    """Train a recipe on this rank; the exit code (0, or 75 where a signal ended it). Raises a BridgeError."""
    # Listening begins before anything slow.
    with StopSignal(_PATIENCE) as signalled:
        try:
            with signalled.at_once():
                return _run(name, overrides, signalled)
        except KeyboardInterrupt:
            # `Stopped`, or what came in its place where a destructor lost it; else Ctrl-C.
            if not signalled or signalled.interrupted:
                raise
            why = "stopped by a signal"
        except Exception as error:
            # Another rank that was told to stop may have left this one alone in the middle of something.
            if not signalled or isinstance(error, BridgeError):
                raise
            why = f"stopped by a signal ({type(error).__name__})"
        finally:
            signalled.ignore_from_now_on()
        print(f"{why}; the same command goes on", file=sys.stderr, flush=True)
        return STOPPED


def _run(name: str, overrides: Sequence[str], signalled: StopSignal) -> int:
    recipe = load_recipe(name, overrides)
    rank, say = rank_from_environment(), partial(print, file=sys.stderr, flush=True)
    check_startable(recipe, world_size_from_environment())
    for note in check_sinks(recipe, rank):
        say(note)
    import torch.distributed as dist

    from bridge.megatron import cpu_runtime

    # Before the loop imports Megatron, which this does faster where there is no GPU.
    cpu_runtime.enable()
    from recipes.data.training import prepared
    from recipes.train.checkpoint import checkpoints
    from recipes.train.loop import train

    # What is wrong with the data is said before a model is built.
    recipe, data = prepared(recipe)
    with sole_run(recipe.output, rank, say):
        if rank == 0:
            say("building the model")
        before = max(checkpoints(Path(recipe.output)), default=0)
        try:
            outcome = train(recipe, data, signalled=signalled)
            if before >= recipe.train.steps and dist.get_rank() == 0:
                print(f"{recipe.output}: was at step {before} of {recipe.train.steps} already", file=sys.stderr)
            return outcome.exit_code
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
