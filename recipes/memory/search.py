"""Layouts of a model on so many GPUs that fit, the quickest first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from bridge.errors import ParallelError
from bridge.mapping.table import Table
from bridge.megatron.layout import check_layout
from bridge.megatron.parallel import Parallel
from recipes.config import ParallelConfig
from recipes.memory.estimate import RESERVE, Estimate, Plan, estimate

# GPUs that a fast link joins; tensor and expert parallelism stay within.
NODE = 8

# What a layout costs against one GPU's worth of work, as rules of thumb: none of these was measured here. Recompute is
# a third of a step's products; the rest is communication that is not hidden, for every doubling.
_RECOMPUTE = {"none": 1.0, "selective": 1.05, "full": 1.33}
_DOUBLING = {"tp": 0.08, "cp": 0.04, "ep": 0.03}


@dataclass(frozen=True)
class Proposal:
    """A layout that fits. `cost`: time of a step, relative to others of the same model and number of GPUs."""

    plan: Plan
    estimate: Estimate
    cost: float

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


def search(table: Table, wanted: Plan, budget: int, global_batch: int) -> list[Proposal]:
    """Proposals for `wanted.world_size` GPUs of `budget` bytes, best first; its layout and recompute are replaced."""
    found = []
    for parallel in layouts(table, wanted.world_size):
        dp = parallel.dp(wanted.world_size)
        if global_batch % (dp * wanted.load.rows):
            continue
        microbatches = global_batch // (dp * wanted.load.rows)
        for recompute, modules in (("none", ()), ("selective", ("core_attn", "mlp")), ("full", ())):
            load = replace(wanted.load, recompute=recompute, recompute_modules=modules)
            plan = replace(wanted, parallel=parallel, load=load, microbatches=microbatches)
            one = estimate(table, plan)
            if one.total + RESERVE <= budget:
                found.append(Proposal(plan, one, _cost(plan)))
                break
    return sorted(found, key=lambda proposal: (proposal.cost, proposal.estimate.total))


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


def _cost(plan: Plan) -> float:
    parallel = plan.parallel
    cost = _RECOMPUTE[plan.load.recompute]
    for name, share in _DOUBLING.items():
        cost *= 1 + share * math.log2(getattr(parallel, name))
    # Stages wait while a pipeline fills and drains.
    return cost * (1 + (parallel.pp - 1) / plan.microbatches)
