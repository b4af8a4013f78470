"""Bytes on the GPU that has to hold the most, by kind, and what to change where they do not fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bridge.generate.memory import cache_bytes
from bridge.mapping.table import DECODER, Entry, Table
from bridge.megatron.layout import check_layout
from bridge.megatron.parallel import Parallel
from recipes.memory.activations import (
    Bytes,
    Load,
    Sizes,
    backward_bytes,
    layer_bytes,
    loss_bytes,
    stage_bytes,
)
from recipes.memory.parameters import ParameterCounts, Trained, count, everything, stages_of_rank

# CUDA's context, NCCL's buffers and what the allocator cannot use. An assumption: it has not been measured here.
RESERVE = 3 << 30


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained, how, over how many ranks.

    `lora_rank`: adapters of that rank, the model frozen; 0: none. `adapters`: their table; by default they are those of
    the projections of attention and of the dense FFN. `whole`: Megatron keys of what is trained beside them.
    `optimizer_bytes` of a trained parameter: 12 (a float32 copy and two moments), 8 where the model is float32 itself,
    6 or 10 with the precision-aware optimizer. `answers`: rows that evaluation answers at once, and the tokens
    of the longest, prompt and answer.
    """

    parallel: Parallel
    world_size: int
    load: Load
    microbatches: int = 1
    optimizer_bytes: int = 12
    lora_rank: int = 0
    adapters: Table | None = None
    whole: frozenset[str] = frozenset()
    trained: Trained = everything
    answers: tuple[int, int] = (0, 0)

    def trains(self, entry: Entry) -> bool:
        """Whether a weight of the model is trained."""
        return entry.key in self.whole if self.lora_rank else self.trained(entry)


@dataclass(frozen=True)
class Estimate:
    """Of the pipeline rank `pp_rank`. `peaks`: what comes on top at the worst moment, by moment. `trained`: elements,
    adapters included, which `counts` leaves out.
    """

    pp_rank: int
    weights: int
    gradients: int
    optimizer: int
    activations: Bytes
    peaks: dict[str, int]
    counts: ParameterCounts
    trained: int

    @property
    def persistent(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Beside weights, gradients and optimizer, at the worst moment."""
        return max(self.peaks.values())

    @property
    def total(self) -> int:
        return self.persistent + self.peak


def estimate(table: Table, plan: TrainingPlan) -> Estimate:
    """The rank of the pipeline that needs most. Raises ParallelError where the layout does not fit the model."""
    check_layout(table.geometry, plan.parallel)
    plan.parallel.dp(plan.world_size)
    return max((of_rank(table, plan, rank) for rank in range(plan.parallel.pp)), key=lambda found: found.total)


def of_rank(table: Table, plan: TrainingPlan, pp_rank: int) -> Estimate:
    """One pipeline rank's estimate."""
    parallel, load = plan.parallel, plan.load
    lora = plan.lora_rank > 0
    counts = count(table, parallel, pp_rank, plan.trains)
    adapters = adapter_counts(table, plan, pp_rank) if lora else ParameterCounts()
    dense, experts = counts.dense + adapters.dense, counts.experts + adapters.experts
    copies = plan.world_size // (parallel.tp * parallel.pp)
    expert_copies = plan.world_size // (parallel.etp * parallel.ep * parallel.pp)
    optimizer = plan.optimizer_bytes * (math.ceil(dense / copies) + math.ceil(experts / expert_copies))

    sizes = Sizes(table.geometry, parallel, load)
    activations, peaks = _activations(table, plan, sizes, pp_rank, counts)
    return Estimate(
        pp_rank,
        weights=load.e * (counts.parameters + counts.buffers + adapters.trained),
        gradients=4 * (dense + experts),
        optimizer=optimizer,
        activations=activations,
        peaks=peaks,
        counts=counts,
        trained=dense + experts,
    )


def _activations(
    table: Table, plan: TrainingPlan, sizes: Sizes, pp_rank: int, counts: ParameterCounts
) -> tuple[Bytes, dict[str, int]]:
    """Kept for the backward passes of all microbatches under way, and what each moment holds in all."""
    parallel, geometry, e = plan.parallel, table.geometry, plan.load.e
    stages = stages_of_rank(geometry, parallel, pp_rank)
    layers = [geometry.layers[index] for _, indices in stages for index in indices]
    under_way = passes_under_way(parallel, pp_rank, plan.microbatches)
    for_backward = stage_bytes(sizes, layers)
    activations: Bytes = Counter({kind: round(size * under_way) for kind, size in for_backward.items() if size})
    last = stages[-1][0] == parallel.pp * parallel.vpp - 1
    total = activations.total()
    head = e * geometry.vocab_size // parallel.tp * geometry.hidden_size
    loss = making = 0
    trains_head = counts.largest > 0 and any(
        plan.trains(entry) for entry in table.entries.values() if entry.key.startswith(_head(table))
    )
    # Beside adapters, only as far as they are asked for.
    trains_tables = not plan.lora_rank or any(plan.trains(e) for e in table.entries.values() if e.row.embedding)
    if last:
        loss, making = loss_bytes(sizes, trains_head, added=geometry.tied and parallel.pp == 1)
        activations["loss"] = loss
    # The backward pass goes from the last layer to the first, and lets go of each.
    worst = done = 0
    for layer in reversed(layers):
        now = backward_bytes(sizes, layer) - done
        if plan.load.recompute == "full":
            # The layer is made again, whole.
            now += layer_bytes(sizes, layer).total()
        worst = max(worst, now)
        done += stage_bytes(sizes, [layer]).total()
    # Tables whose gradients come out whole at the end, when layers have let go of theirs.
    tables = 0
    if counts.largest and trains_tables:
        if pp_rank == 0:
            tables = head
        if geometry.ple is not None:
            share = len(layers) / geometry.num_layers
            embedding = round(
                e * geometry.ple.vocab_size // parallel.tp * geometry.num_layers * geometry.ple.dim * share
            )
            tables = max(tables, embedding)
    peaks = {
        "loss": total + loss + making if last else 0,
        "backward pass of a layer": total + worst,
        "gradients of the embeddings": round(total * (1 - 1 / under_way)) + tables,
    }
    if plan.answers[0]:
        of_layers = [index for _, indices in stages for index in indices]
        caches = cache_bytes(geometry, of_layers, *plan.answers, e, parallel.tp)
        # Activations of a step are gone by then.
        peaks["keys and values of answers"] = caches
    return activations, peaks


def _head(table: Table) -> str:
    return "embedding." if table.geometry.tied else "output_layer."


def passes_under_way(parallel: Parallel, pp_rank: int, microbatches: int) -> float:
    """How many forward passes of all of a rank's layers wait for their backward pass at most (1F1B, interleaved)."""
    if parallel.vpp == 1:
        return min(microbatches, parallel.pp - pp_rank)
    chunks = 2 * (parallel.pp - pp_rank - 1) + (parallel.vpp - 1) * parallel.pp + 1
    return min(microbatches * parallel.vpp, chunks) / parallel.vpp


def adapter_counts(table: Table, plan: TrainingPlan, pp_rank: int) -> ParameterCounts:
    """Elements of a rank's adapters; without a table of them, A [r, in] and B [out, r] of what has one by default."""
    if plan.adapters is not None:
        return count(plan.adapters, plan.parallel, pp_rank)
    ways = {None: 1, "tp": plan.parallel.tp, "ep": plan.parallel.ep, "etp": plan.parallel.etp}
    layers = {index for _, indices in stages_of_rank(table.geometry, plan.parallel, pp_rank) for index in indices}
    dense = 0
    for entry in table.entries.values():
        if entry.layer is None or entry.layer.index not in layers or not _linear(entry):
            continue
        out, into = entry.row.shard
        for source in entry.sources:
            dense += plan.lora_rank * (source.shape[-1] // ways[into] + source.shape[-2] // ways[out])
    return ParameterCounts(dense=dense)


def _linear(entry: Entry) -> bool:
    """A weight that parallel ranks split: a projection, not a norm, not the router, and not the experts."""
    return entry.row.stack is DECODER and len(entry.shape) == 2 and any(entry.row.shard)


def advice(table: Table, plan: TrainingPlan, budget: int) -> list[str]:
    """What would bring the estimate within `budget` bytes, the least change first."""
    found = []
    tries: Sequence[tuple[str, TrainingPlan]] = [
        ("parallel.recompute=full", replace(plan, load=replace(plan.load, recompute="full"))),
        ("train.micro_batch_size=1", replace(plan, load=replace(plan.load, rows=1))),
        ("lora.rank=16 instead of all weights", replace(plan, lora_rank=16)),
    ]
    for said, other in tries:
        if other != plan and estimate(table, other).total + RESERVE <= budget:
            found.append(said)
    return found
