"""Comparisons with transformers, as ranks are told of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.verify.sample import VerificationSample

if TYPE_CHECKING:
    import torch

# Rows of a microbatch.
MICRO_BATCH = 2


def row_count_multiple(parallel: Parallel) -> int:
    """What the rows of a batch must be a multiple of, for whole microbatches, as many as Megatron's schedule takes."""
    return parallel.dp(parallel.world_size) * parallel.microbatch_multiple * MICRO_BATCH


@dataclass(frozen=True)
class ParityTask:
    """One comparison. `checkpoint` is an HF folder, or the weights folder of a Megatron checkpoint (`megatron`).

    `references` are files of `compute_reference`, "dtype" the one in the dtype of the run; with bf16, "float32" beside.
    `adapter`: a Megatron adapter that the model gets (then without gradients); the reference has it too.
    `packed`: the rows of a micro batch are documents of one row; the reference has them one by one all the same.
    """

    variant: str
    geometry: Geometry
    checkpoint: Path
    megatron: bool
    parallel: Parallel
    dtype: torch.dtype
    sample: VerificationSample
    references: dict[str, Path]
    gradients: bool = True
    logits: bool = True
    micro_batch_size: int = MICRO_BATCH
    overrides: dict[str, Any] = field(default_factory=dict)
    overlap_grad_reduce: bool = False
    steps: int = 1
    note: str = ""
    packed: bool = False
    attention_backends: dict[str, str] = field(default_factory=dict)
    adapter: Path | None = None


@dataclass(frozen=True)
class StreamedTask:
    """What to compare: an HF folder with itself, or with the weights folder of its Megatron checkpoint.

    `layers`: those that are compared, and run at all; None: all. `theirs`: the file of transformers' side.
    `progress`: a file that gets a line now and then.
    """

    variant: str
    geometry: Geometry
    folder: Path
    megatron: Path | None
    sample: VerificationSample
    layers: tuple[int, ...] | None
    theirs: Path
    progress: Path

    @property
    def run(self) -> frozenset[int]:
        """Layers that run: those asked for, and those whose keys and values they read."""
        asked = range(self.geometry.num_layers) if self.layers is None else self.layers
        return frozenset(asked) | {self.geometry.layers[i].kv_source for i in asked}
