"""The memory estimate against what ranks hold and what the allocator saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge import Gemma4Bridge
from bridge.megatron.parallel import Parallel, initialize
from bridge.ranks import RankPool
from recipes.memory.parameters import count

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

    from bridge.megatron.multimodal import FREEZABLE
    from recipes.config import resolve
    from recipes.train.setup import make_optimizer, wrap

    bridge = Gemma4Bridge.from_hf(folder)
    groups = initialize(parallel)
    provider = bridge.provider(
        parallel, torch.bfloat16, frozen=FREEZABLE, overrides={"perform_initialization": False}
    )
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
