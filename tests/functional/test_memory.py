"""The memory estimate against what ranks hold and what the allocator saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge import Gemma4Bridge
from bridge.megatron.parallel import Parallel, initialize
from bridge.ranks import RankPool
from recipes.config import resolve
from recipes.memory.estimate import of_rank
from recipes.memory.parameters import count
from recipes.memory.recipe import plan_of

LAYOUTS: list[tuple[str, int, Parallel]] = [
    ("e2b", 1, Parallel()),
    ("e2b", 2, Parallel(tp=2, sequence_parallel=True)),
    ("e2b", 4, Parallel(tp=2, pp=2)),
    ("e4b", 2, Parallel(pp=2, vpp=2)),
    ("12b", 4, Parallel(pp=4)),
    ("26b-a4b", 2, Parallel(ep=2)),
    ("26b-a4b", 4, Parallel(tp=2, pp=2, ep=2, sequence_parallel=True)),
    ("26b-a4b", 2, Parallel(etp=2)),
    ("31b", 4, Parallel(tp=2, cp=2, sequence_parallel=True)),
]


def built(folder: str, parallel: Parallel) -> tuple[int, int, int, int, int]:
    """(pipeline rank, parameters, trained, trained experts, optimizer's elements) of a rank, as built."""
    import torch.distributed as dist

    from recipes.config import resolve
    from recipes.train.setup import make_optimizer, wrap

    bridge = Gemma4Bridge.from_hf(folder)
    groups = initialize(parallel)
    provider = bridge.provider(parallel, torch.bfloat16, overrides={"perform_initialization": False})
    models = provider.build(groups)
    chunks = wrap(provider, models, groups, overlap=False)
    optimizer = make_optimizer(resolve({"output": "x", "train": {"steps": 1}}), chunks, groups)
    parameters = [p for model in models for p in model.parameters()]
    mains = [
        tensor
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for tensor in group["params"]
    ]
    assert dist.is_initialized()
    return (
        groups.pp.rank(),
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        sum(p.numel() for p in parameters if p.requires_grad and not getattr(p, "allreduce", True)),
        sum(t.numel() for t in mains),
    )


@pytest.mark.parametrize(("variant", "world", "parallel"), LAYOUTS, ids=lambda v: str(v))
def test_parameters_of_every_rank(
    ranks: RankPool, toy: Callable[..., Path], variant: str, world: int, parallel: Parallel
) -> None:
    folder = toy(variant)
    table = Gemma4Bridge.from_hf(folder).table
    held: dict[int, list[Any]] = {}
    for pp_rank, *figures in ranks.run(built, str(folder), parallel, world_size=world):
        held.setdefault(pp_rank, []).append(figures)
    assert sorted(held) == list(range(parallel.pp))
    for pp_rank, figures in held.items():
        want = count(table, parallel, pp_rank)
        for parameters, trained, experts, _ in figures:
            assert (parameters, trained, experts) == (want.parameters, want.trained, want.experts)
        # Between them, data-parallel ranks hold every float32 copy once.
        dense_copies, expert_copies = (
            world // (parallel.tp * parallel.pp),
            world // (parallel.etp * parallel.ep * parallel.pp),
        )
        per_rank = [want.dense / dense_copies + want.experts / expert_copies] * len(figures)
        assert sum(optimizer for *_, optimizer in figures) == pytest.approx(sum(per_rank), abs=0.5)


# (variant, ranks, overrides).
TRAINED: list[tuple[str, int, list[str]]] = [
    ("e2b", 1, []),
    ("e2b", 1, ["model.dtype=bfloat16", "train.micro_batch_size=2"]),
    ("e2b", 1, ["parallel.recompute=full"]),
    ("12b", 1, ["model.dtype=bfloat16"]),
    ("26b-a4b", 1, ["model.dtype=bfloat16"]),
    ("26b-a4b", 1, ["model.dtype=bfloat16", "parallel.recompute=full"]),
    ("26b-a4b", 1, ["model.dtype=bfloat16", "parallel.recompute=selective", "parallel.recompute_modules=[moe]"]),
    ("31b", 1, ["model.dtype=bfloat16", "parallel.recompute=selective", "train.micro_batch_size=2"]),
    ("31b", 2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    ("12b", 2, ["parallel.pp=2"]),
]


def said(folder: str, overrides: list[str]) -> Any:
    """The recipe: two microbatches per replica, and attention in tiles, of which the estimate is."""
    fixed = {"steps": 1, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 256}
    tiles = {"sliding": "blockwise", "global": "blockwise"}
    model = {"hf": folder, "dtype": "float32", "attention_backends": tiles}
    return resolve({"output": "x", "model": model, "train": fixed}, overrides)


def peak_of_a_step(folder: str, overrides: list[str]) -> int:
    """The most that torch's allocator held during the forward and backward passes of a step, beyond what it held
    before: the sum of the allocator's own events, which the profiler records, temporaries inside operators included.
    """
    from torch.profiler import ProfilerActivity, profile

    from recipes.train.setup import build
    from recipes.train.step import clear_gradients, run_microbatches

    recipe = said(folder, overrides)
    run = build(recipe, load=True)
    ids = torch.randint(8, 400, (recipe.train.micro_batch_size, recipe.train.seq_length))
    batches = [{"input_ids": ids, "labels": ids.roll(-1, 1)}] * run.microbatches
    # What the first step makes once and keeps is not the step's.
    run_microbatches(run, batches, train=True)
    clear_gradients(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_microbatches(run, batches, train=True)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(("variant", "world", "overrides"), TRAINED, ids=lambda v: str(v))
def test_the_peak_of_a_training_step(
    ranks: RankPool,
    toy: Callable[..., Path],
    record_property: Any,
    variant: str,
    world: int,
    overrides: list[str],
) -> None:
    folder = toy(variant)
    peaks = ranks.run(peak_of_a_step, str(folder), overrides, world_size=world)
    table = Gemma4Bridge.from_hf(folder).table
    plan = plan_of(said(str(folder), overrides), world, table)
    plan = replace(plan, load=replace(plan.load, on_cpu=True))
    for rank, measured in enumerate(peaks):
        pp_rank = rank * plan.parallel.pp // world
        estimated = of_rank(table, plan, pp_rank).peak
        record_property(f"ratio of rank {rank}", estimated / measured)
        print(f"{variant} {overrides} rank {rank}: {estimated / 1e6:.1f} MB estimated, {measured / 1e6:.1f} measured")
        assert estimated == pytest.approx(measured, rel=0.1)
