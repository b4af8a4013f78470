"""What runs on a rank for `verify`: the process that asks imports neither Megatron nor transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bridge.verify.result import Check
from bridge.verify.sample import VerificationSample
from bridge.verify.task import ParityTask

if TYPE_CHECKING:
    import torch


def run(task: ParityTask) -> list[Check]:
    """Compare, and return the rows that this rank measured."""
    from bridge.verify.parity import run_parity

    return run_parity(task)


def run_reference(folder: Path, sample: VerificationSample, dtype: torch.dtype, gradients: bool, out: Path) -> None:
    """What transformers computes. See `bridge.verify.reference.compute_reference`."""
    from bridge.verify.reference import compute_reference

    compute_reference(folder, sample, dtype, gradients, out)
