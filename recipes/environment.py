"""What a launcher says of the ranks, in the environment."""

from __future__ import annotations

import os


def world_size_from_environment() -> int:
    """How many ranks the launcher (torchrun, srun) started; 1 without one."""
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 1


def rank_from_environment() -> int:
    """Which of them this process is; 0 without a launcher."""
    for name in ("RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0
