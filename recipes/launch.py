"""From a recipe's name to a run: the checks that need no packages first, then the loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bridge.megatron.quiet import quiet
from recipes.check import check_startable
from recipes.config import load_recipe, rank_from_environment, world_size_from_environment
from recipes.train.signals import StopSignal
from recipes.train.sinks import check_sinks
from recipes.train.sole import sole_run


def run_recipe(name: str, overrides: Sequence[str] = ()) -> int:
    """Train a recipe on this rank; the exit code (0, or 75 where a signal ended it). Raises a BridgeError."""
    # Listening begins before anything slow: a signal that comes while packages load ends the run after its first step.
    with StopSignal() as signalled, ExitStack() as stack:
        recipe = load_recipe(name, overrides)
        rank = rank_from_environment()
        check_startable(recipe, world_size_from_environment())
        for note in check_sinks(recipe, rank):
            print(note, file=sys.stderr)
        quiet()
        import torch.distributed as dist

        from bridge.megatron import cpu_runtime

        # Before the loop imports Megatron, which this does faster where there is no GPU.
        cpu_runtime.enable()
        from recipes.data.training import prepared
        from recipes.train.checkpoint import checkpoints
        from recipes.train.loop import train

        # What is wrong with the data is said before a model is built.
        recipe, data = prepared(recipe)
        say = partial(print, file=sys.stderr)
        stack.enter_context(sole_run(recipe.output, rank, say))
        before = max(checkpoints(Path(recipe.output)), default=0)
        try:
            outcome = train(recipe, data, signalled=signalled)
            if before >= recipe.train.steps and dist.get_rank() == 0:
                print(f"{recipe.output}: was at step {before} of {recipe.train.steps} already", file=sys.stderr)
            return outcome.exit_code
        finally:
            signalled.ignore_from_now_on()
            if dist.is_initialized():
                dist.destroy_process_group()
