"""The parallel layout of a run: its sizes, what they demand of the number of ranks, and Megatron's groups for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from bridge.errors import ParallelError

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Parallel:
    """How many ways a model is split: tensor, pipeline (and stages per rank), expert, expert-tensor, context.

    Attention and dense layers divide the ranks as tp × cp × pp × dp, experts as etp × ep × pp × edp: a world must be a
    multiple of both. `vpp` is the number of model chunks per pipeline rank; 1 is no interleaving.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    cp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "sequence_parallel":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParallelError(f"{field.name}={value!r}: a parallel size is a positive integer")
        if self.vpp > 1 and self.pp == 1:
            raise ParallelError(f"vpp={self.vpp} needs pp > 1: one stage has nothing to interleave")
        if self.sequence_parallel and self.tp == 1:
            raise ParallelError("sequence_parallel needs tp > 1")

    @property
    def world_size(self) -> int:
        """The smallest number of ranks that carries this layout."""
        return math.lcm(self.tp * self.cp, self.etp * self.ep) * self.pp

    @property
    def row_multiple(self) -> int:
        """What the length of a row must be a multiple of: two chunks a rank under CP, split again by TP under SP."""
        split = math.lcm(2 if self.cp > 1 else 1, self.tp if self.sequence_parallel else 1)
        return self.cp * split

    @property
    def microbatch_multiple(self) -> int:
        """What the number of microbatches of a step must be a multiple of: interleaved stages take them by `pp`."""
        return self.pp if self.vpp > 1 else 1

    def dp(self, world_size: int) -> int:
        """How many data-parallel replicas of the dense layers `world_size` ranks hold. Raises ParallelError."""
        dense, experts = self.tp * self.cp * self.pp, self.etp * self.ep * self.pp
        if world_size < 1 or world_size % dense:
            raise ParallelError(
                f"{world_size} ranks are no multiple of tp × cp × pp = {self.tp} × {self.cp} × {self.pp} = {dense}"
            )
        if world_size % experts:
            raise ParallelError(
                f"{world_size} ranks are no multiple of etp × ep × pp = {self.etp} × {self.ep} × {self.pp} = {experts}"
            )
        return world_size // dense

    def __str__(self) -> str:
        """The sizes that are not 1: `TP2+SP PP2`, `EP2 ETP2`; `1 rank` where all are."""
        names = {"tp": "TP", "cp": "CP", "pp": "PP", "vpp": "VPP", "ep": "EP", "etp": "ETP"}
        parts = [f"{label}{getattr(self, name)}" for name, label in names.items() if getattr(self, name) > 1]
        if self.sequence_parallel:
            parts[0] += "+SP"
        return " ".join(parts) or "1 rank"


def check_groups(parallel: Parallel, groups: ProcessGroupCollection, experts: bool) -> None:
    """Raise ParallelError where process groups are of another layout; `experts`: those of experts count too."""
    have = {"tp": groups.tp, "pp": groups.pp, "cp": groups.cp}
    if experts:
        have |= {"ep": groups.ep, "etp": groups.expt_tp}
    for name, group in have.items():
        if group.size() != getattr(parallel, name):
            raise ParallelError(
                f"{name}={getattr(parallel, name)}: Megatron's groups were made with {name}={group.size()}; "
                "`bridge.megatron.parallel.initialize` makes others"
            )


def initialize(parallel: Parallel, *, seed: int = 1234) -> ProcessGroupCollection:
    """Make Megatron's process groups for `parallel` over all ranks, and seed its random states.

    torch.distributed must be initialised. Raises ParallelError where the ranks do not divide as the layout asks.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        raise ParallelError("torch.distributed is not initialised: call torch.distributed.init_process_group() first")
    parallel.dp(dist.get_world_size())
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=False,  # beside those of the default backend; nothing here asks for them
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()
