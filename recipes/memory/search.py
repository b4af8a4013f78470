"""Layouts of a model on so many GPUs that fit, the quickest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bridge.errors import ParallelError
from bridge.mapping.table import Table
from bridge.megatron.layout import check_layout
from bridge.megatron.parallel import Parallel
from recipes.config import ParallelConfig
from recipes.memory.estimate import RESERVE, Estimate, TrainingPlan, estimate
from recipes.simulate.hardware import Hardware, nearest_hardware
from recipes.simulate.predict import predicted_parts

# GPUs that a fast link joins; tensor and expert parallelism stay within.
NODE = 8

# What may be made again in the backward pass, the least first. Attention keeps little; what an FFN and experts keep is
# worth their products.
_RECOMPUTE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("none", ()),
    ("selective", ("mlp",)),
    ("selective", ("mlp", "moe")),
    ("full", ()),
)


@dataclass(frozen=True)
class Proposal:
    """A layout that fits. `parts`: predicted seconds of a step by what they go into."""

    plan: TrainingPlan
    estimate: Estimate
    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        """Of a step, predicted."""
        return sum(self.parts.values())

    def overrides(self, over: ParallelConfig | None = None) -> list[str]:
        """As overrides of a recipe whose section `parallel` is `over`, by default that of a recipe that says nothing.

        All that differs is named: what the recipe says and the proposal does not would stand otherwise.
        """
        load = self.plan.load
        wanted = vars(self.plan.parallel) | {"recompute": load.recompute}
        if load.recompute == "selective":
            wanted["recompute_modules"] = list(load.recompute_modules)
        stands = vars(over or ParallelConfig())
        words = [f"parallel.{name}={_written(value)}" for name, value in wanted.items() if value != stands[name]]
        return [*words, f"train.micro_batch_size={load.rows}"]


def _written(value: object) -> str:
    """As an override's right side."""
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return str(value).lower()


def search(
    table: Table, wanted: TrainingPlan, budget: int, global_batch: int, hardware: Hardware | None = None
) -> list[Proposal]:
    """Proposals for `wanted.world_size` GPUs of `budget` bytes, best first; its layout and recompute are replaced.

    `hardware`: by default the profile whose memory is nearest.
    """
    found, hardware = [], hardware or nearest_hardware(budget)
    experts = table.geometry.moe is not None
    for parallel in layouts(table, wanted.world_size):
        dp = parallel.dp(wanted.world_size)
        if global_batch % (dp * wanted.load.rows):
            continue
        microbatches = global_batch // (dp * wanted.load.rows)
        for recompute, modules in _RECOMPUTE:
            if "moe" in modules and not experts:
                continue
            load = replace(wanted.load, recompute=recompute, recompute_modules=modules)
            plan = replace(wanted, parallel=parallel, load=load, microbatches=microbatches)
            one = estimate(table, plan)
            if one.total + RESERVE <= budget:
                found.append(Proposal(plan, one, predicted_parts(table, plan, hardware)))
                break
    return sorted(found, key=lambda proposal: (proposal.seconds, proposal.estimate.total))


def layouts(table: Table, gpus: int) -> Iterator[Parallel]:
    """Every layout in powers of two that the model and the number of GPUs allow, without interleaving and ETP."""
    experts = table.geometry.moe is not None
    sizes = [2**i for i in range(gpus.bit_length()) if gpus % 2**i == 0]
    for tp in sizes:
        for pp in sizes:
            for cp in sizes:
                for ep in sizes if experts else [1]:
                    if tp > NODE or gpus % (tp * pp * cp) or gpus % (ep * pp):
                        continue
                    parallel = Parallel(tp=tp, pp=pp, cp=cp, ep=ep, sequence_parallel=tp > 1)
                    try:
                        check_layout(table.geometry, parallel)
                    except ParallelError:
                        continue
                    yield parallel
