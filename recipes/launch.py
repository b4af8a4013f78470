"""From a recipe's name to a run: the checks that need no packages first, then the loop."""

from __future__ import annotations

from collections.abc import Sequence

from bridge.megatron.quiet import quiet
from recipes.config import check_startable, load_recipe, world_size_from_environment
from recipes.train.signals import StopSignal


def run_recipe(name: str, overrides: Sequence[str] = ()) -> int:
    """Train a recipe on this rank; the exit code (0, or 75 where a signal ended it). Raises a BridgeError."""
    # Listening begins before anything slow: a signal that comes while packages load ends the run after its first step.
    with StopSignal() as signalled:
        recipe = load_recipe(name, overrides)
        check_startable(recipe, world_size_from_environment())
        quiet()
        import torch.distributed as dist

        from bridge.megatron import cpu_runtime

        # Before the loop imports Megatron, which this does faster where there is no GPU.
        cpu_runtime.enable()
        from recipes.train.loop import train

        try:
            return train(recipe, signalled=signalled).exit_code
        finally:
            signalled.ignore_from_now_on()
            if dist.is_initialized():
                dist.destroy_process_group()
