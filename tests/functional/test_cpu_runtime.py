"""A stock Megatron GPT model, with Megatron's own schedules, trains on gloo in every layout as it does on one rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bridge.megatron.parallel import Parallel, initialize
from bridge.ranks import RankPool

from .stock_gpt_kit import STEPS, Case, train

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
ALLTOALL = {"moe_token_dispatcher_type": "alltoall"}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}

CASES = {
    "TP2": Case(Parallel(tp=2)),
    "TP4": Case(Parallel(tp=4)),
    "TP2+SP": Case(Parallel(tp=2, sequence_parallel=True)),
    "PP2": Case(Parallel(pp=2)),
    "PP2 VPP2": Case(Parallel(pp=2, vpp=2)),
    "PP4": Case(Parallel(pp=4)),
    "TP2+SP PP2": Case(Parallel(tp=2, pp=2, sequence_parallel=True)),
    "TP2+SP bf16": Case(Parallel(tp=2, sequence_parallel=True), bf16=True),
    "PP2 EP2 bf16": Case(Parallel(pp=2, ep=2), moe=True, config=ALLTOALL, bf16=True),
    "DP2": Case(world=2),
    "DP2 overlap": Case(world=2, ddp=OVERLAP),
    "DP2 all-reduce": Case(world=2, ddp={"use_distributed_optimizer": False}),
    "DP2 average": Case(world=2, ddp={"average_in_collective": True}),
    "full recompute": Case(Parallel(tp=2, sequence_parallel=True), config=FULL),
    "selective recompute": Case(Parallel(tp=2), config=SELECTIVE),
    "PP2 VPP2 full recompute": Case(Parallel(pp=2, vpp=2), config=FULL),
    "EP2 allgather": Case(Parallel(ep=2), moe=True),
    "EP2 alltoall": Case(Parallel(ep=2), moe=True, config=ALLTOALL),
    "EP4 alltoall": Case(Parallel(ep=4), moe=True, config=ALLTOALL | FULL),
    "TP2+SP EP2 alltoall": Case(Parallel(tp=2, ep=2, sequence_parallel=True), moe=True, config=ALLTOALL),
    "TP2+SP EP2 allgather": Case(Parallel(tp=2, ep=2, sequence_parallel=True), moe=True),
    "ETP2": Case(Parallel(etp=2), moe=True, config=ALLTOALL),
    "TP2+SP ETP2 allgather": Case(Parallel(tp=2, etp=2, sequence_parallel=True), moe=True),
    "TP2+SP EP2 ETP2 alltoall": Case(Parallel(tp=2, ep=2, etp=2, sequence_parallel=True), moe=True, config=ALLTOALL),
    "TP2+SP EP2 ETP2 allgather": Case(Parallel(tp=2, ep=2, etp=2, sequence_parallel=True), moe=True),
    "PP2 EP2 alltoall": Case(Parallel(pp=2, ep=2), moe=True, config=ALLTOALL),
}


_reference: dict[tuple[bool, bool], list[tuple[float, float]]] = {}


def reference(ranks: RankPool, case: Case) -> list[tuple[float, float]]:
    """The history of one rank, trained once per kind of model."""
    key = (case.moe, case.bf16)
    if key not in _reference:
        _reference[key] = ranks.run(train, Case(moe=case.moe, bf16=case.bf16), world_size=1)[0]
    return _reference[key]


@pytest.mark.parametrize("name", CASES)
def test_layout_trains_like_one_rank(ranks: RankPool, name: str) -> None:
    case = CASES[name]
    expected = reference(ranks, case)
    histories = ranks.run(train, case, world_size=case.world_size, timeout_s=120)
    loss_bound, norm_bound = (1e-2, 5e-2) if case.bf16 else (1e-5, 1e-4)
    for history in histories:
        for (loss, norm), (expected_loss, expected_norm) in zip(history, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=loss_bound)
            assert norm == pytest.approx(expected_norm, rel=norm_bound)


def test_the_model_learns_and_the_steps_differ(ranks: RankPool) -> None:
    losses = [loss for loss, _ in reference(ranks, Case())]
    assert losses[-1] < losses[0] and len(set(losses)) == STEPS


def uneven_collectives() -> None:
    """Rank r holds r rows (rank 0: none), of value r; then each reduces what it and the others hold."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = [torch.empty(r, 2) for r in range(size)]
    dist.all_gather(parts, torch.full((rank, 2), float(rank)))
    for r, part in enumerate(parts):
        assert torch.equal(part, torch.full((r, 2), float(r)))
    output = torch.empty(rank, 2, dtype=torch.bfloat16)
    dist.reduce_scatter(output, [torch.full((r, 2), r + 1.0, dtype=torch.bfloat16) for r in range(size)])
    assert torch.equal(output, torch.full_like(output, size * (rank + 1.0)))
    dist.barrier(device_ids=[torch.cuda.current_device()])


def test_uneven_collectives(ranks: RankPool) -> None:
    ranks.run(uneven_collectives)


def buffers_of_one_rank_and_of_several() -> None:
    """A rank alone sends nothing to itself where all is in place; elsewhere, and with others, it is as ever."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    rank, size = dist.get_rank(), dist.get_world_size()
    alone = [dist.new_group([each]) for each in range(size)][rank]
    for group, ranks in ((alone, 1), (dist.group.WORLD, size)):
        sent = []
        for async_op in (False, True):
            whole = torch.full([2 * size], float(rank + 1))
            part = whole.chunk(ranks)[dist.get_rank(group)]
            with torch.profiler.profile() as profile:
                with buffers._coalescing_manager(group, async_ops=async_op) as coalesced:
                    buffers.dist_reduce_scatter_func(part, whole, op=dist.ReduceOp.SUM, group=group, async_op=async_op)
                if async_op:
                    coalesced.wait()
            total = float(rank + 1) if ranks == 1 else size * (size + 1) / 2
            assert torch.equal(part, torch.full_like(part, total))
            sent.append(any("reduce_scatter" in event.key for event in profile.key_averages()))
        assert sent == [ranks > 1] * 2
    elsewhere, given = torch.zeros(3), torch.full([3], float(rank))
    buffers.dist_all_gather_func(elsewhere, given, group=alone, async_op=False)
    assert torch.equal(elsewhere, given)


def test_buffers_of_one_rank_and_of_several(ranks: RankPool) -> None:
    ranks.run(buffers_of_one_rank_and_of_several, world_size=2)


def tensors_that_ask_for_cuda() -> None:
    """What Megatron and its users write on a GPU gives tensors on the device there is."""
    device = torch.cuda.current_device()
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert torch.zeros(2, device="cuda").device == torch.tensor(1, device=0).device == device
    assert torch.empty_like(torch.ones(2), device=torch.device("cuda", 0)).device == device
    assert torch.ones(2).to("cuda").to(0).cuda().new_zeros(2, device="cuda").device == device
    assert torch.ones(2).to(torch.float16).dtype == torch.ones(2).to("cuda", torch.float16).dtype == torch.float16
    assert torch.tensor([1.0], pin_memory=True).pin_memory().tolist() == [1.0]
    layer = torch.nn.Linear(2, 2).cuda().to("cuda")
    assert layer.weight.type() == "torch.cuda.FloatTensor" and layer.bfloat16().weight.device == device
    assert torch.ones(2).type(torch.int32).dtype == torch.int32
    # the functions below keep working on what was wrapped
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
    assert torch.jit.script(_scripted)(torch.ones(2)).tolist() == [1.0, 1.0]
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        event.record(torch.cuda.current_stream())
        stream.wait_stream(torch.cuda.current_stream())
    assert event.elapsed_time(stream.record_event()) >= 0


def _scripted(x: torch.Tensor) -> torch.Tensor:
    return x + torch.zeros([2])


def test_tensors_that_ask_for_cuda(ranks: RankPool) -> None:
    ranks.run(tensors_that_ask_for_cuda, world_size=1)


def random_states() -> tuple[float, float, bool]:
    """A draw of each tracker's state, and whether recomputation drops out the same elements again."""
    from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker

    initialize(Parallel(tp=2))
    common = float(torch.rand(()))
    with get_cuda_rng_tracker().fork():
        own = float(torch.rand(()))
    x = torch.ones(1000, requires_grad=True)
    masks = []

    def run(x: torch.Tensor) -> torch.Tensor:
        with get_cuda_rng_tracker().fork():
            masks.append(torch.nn.functional.dropout(torch.ones(1000)))
        return x * masks[-1]

    checkpoint(run, False, x).sum().backward()
    return common, own, len(masks) == 2 and torch.equal(*masks)


def test_random_states(ranks: RankPool) -> None:
    (common, own, same), (other_common, other_own, other_same) = ranks.run(random_states, world_size=2)
    assert common == other_common and own != other_own
    assert same and other_same


def enable_and_disable() -> None:
    """Both may be repeated, and nothing stays."""
    from bridge.megatron import cpu_runtime

    if torch.cuda.is_available():
        assert not cpu_runtime.enable() and not cpu_runtime.is_enabled()
        return
    assert cpu_runtime.is_enabled() and cpu_runtime.enable()
    # Ranks start a third faster without it: nothing that they import on the way may ask for the compiler.
    assert "torch._inductor.compile_fx" not in sys.modules and torch.compile.__module__ == "torch"
    cpu_runtime.disable()
    cpu_runtime.disable()
    try:
        assert not cpu_runtime.is_enabled()
        assert "to" not in vars(torch.Tensor) and torch.ones(1).type() == "torch.FloatTensor"
        assert torch.zeros.__class__.__name__ == "builtin_function_or_method"
    finally:
        assert cpu_runtime.enable()


def test_enable_and_disable(ranks: RankPool) -> None:
    ranks.run(enable_and_disable, world_size=1)


def save_and_load(folder: str) -> None:
    """A distributed checkpoint of a sharded tensor, written and read back."""
    from megatron.core import dist_checkpointing

    initialize(Parallel(tp=2))
    rank = dist.get_rank()
    whole = torch.arange(8.0).reshape(4, 2)

    def sharded(data: torch.Tensor) -> dict[str, Any]:
        return {"w": dist_checkpointing.ShardedTensor.from_rank_offsets("w", data, (0, rank, 2))}

    dist_checkpointing.save(sharded(whole[2 * rank : 2 * rank + 2].clone()), folder)
    loaded = dist_checkpointing.load(sharded(torch.zeros(2, 2)), folder)
    assert torch.equal(loaded["w"], whole[2 * rank : 2 * rank + 2])


def test_distributed_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(save_and_load, str(tmp_path), world_size=2, timeout_s=120)
