"""Simulated ranks against real ones: bytes of collectives, by group and kind, and memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.ranks import RankPool
from tests.functional.test_memory import TRAINED, peak_of_a_step, said

# By (kind, group, size of the group): [bytes, calls].
Moved = dict[tuple[str, str, int], list[int]]

# The larger of a rank's buffers, by what torch dispatches: its place among the arguments.
_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "broadcast_": ("broadcast", 0),
}


@contextmanager
def recorded() -> Iterator[Moved]:
    """What the ranks send to each other in the block."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_flatten

    found: Moved = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            if name.startswith("c10d::") and name != "c10d::barrier":
                kind, place = _OPERATIONS[name.removeprefix("c10d::")]
                boxed = next(a for a, s in zip(args, func._schema.arguments, strict=False) if s.name == "process_group")
                group = dist.ProcessGroup.unbox(boxed)
                size = sum(x.nbytes for x in tree_flatten(args[place])[0])
                entry = found.setdefault((kind, group.group_desc, group.size()), [0, 0])
                entry[0] += size
                entry[1] += 1
            return func(*args, **(kwargs or {}))

    with Recorder():
        yield found


def moved_by_a_step(folder: str, overrides: list[str]) -> Moved:
    """Of this rank, in the second step of a run."""
    from recipes.train.setup import build
    from recipes.train.step import clear_gradients, reduce_sums, run_microbatches, update

    recipe = said(folder, overrides)
    run = build(recipe, load=True)
    ids = torch.randint(8, 400, (recipe.train.micro_batch_size, recipe.train.seq_length))

    def step() -> None:
        clear_gradients(run)
        reduce_sums(run_microbatches(run, [{"input_ids": ids, "labels": ids}] * run.microbatches, train=True))
        run.scheduler.step(1)
        update(run, float("inf"))

    step()
    with recorded() as found:
        step()
    return found


def simulated(
    folder: str, overrides: list[str], world: int, ranks: Sequence[int]
) -> list[tuple[Moved, dict[str, int]]]:
    """The same of ranks that are not there, and the bytes that they hold at most, by moment."""
    from bridge.geometry import Geometry
    from recipes.simulate.events import Collective
    from recipes.simulate.rank import simulate_rank

    results = []
    for rank in ranks:
        one = simulate_rank(said(folder, overrides), Geometry.from_folder(Path(folder)), world, rank, gpu=False)
        found: Moved = {}
        for event in one.events:
            if isinstance(event, Collective):
                entry = found.setdefault((event.kind, event.group.name, len(event.group.ranks)), [0, 0])
                entry[0] += event.size
                entry[1] += 1
        results.append((found, one.peaks))
    return results


slow = pytest.mark.slow
LAYOUTS = [
    pytest.param(
        "31b", 2, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.recompute=full"], id="TP2+SP"
    ),
    pytest.param("e2b", 2, ["parallel.tp=2"], id="TP2", marks=slow),
    pytest.param("e2b", 2, ["parallel.pp=2"], id="PP2"),
    pytest.param("31b", 2, ["parallel.pp=2", "parallel.vpp=2"], id="VPP2", marks=slow),
    pytest.param("26b-a4b", 2, ["parallel.ep=2"], id="EP2"),
    pytest.param("12b", 2, ["parallel.cp=2"], id="CP2", marks=slow),
    pytest.param("e2b", 2, ["parallel.overlap=true"], id="DP2 overlapped", marks=slow),
    pytest.param("12b", 2, ["model.dtype=bfloat16"], id="DP2", marks=slow),
    pytest.param(
        "26b-a4b",
        4,
        ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2", "parallel.pp=2"],
        id="TP2+SP PP2 EP2",
        marks=slow,
    ),
]


@pytest.mark.parametrize(("variant", "world", "overrides"), LAYOUTS)
def test_bytes_of_collectives(
    ranks: RankPool, toy: Callable[..., Path], variant: str, world: int, overrides: list[str]
) -> None:
    """Equal, by group and kind. Where real tokens choose their experts, over all ranks together."""
    folder = str(toy(variant))
    real: list[Moved] = ranks.run(moved_by_a_step, folder, overrides, world_size=world)
    ((*of_ranks,),) = ranks.run(simulated, folder, overrides, world, range(world), world_size=1)
    fake = [found for found, _ in of_ranks]
    assert all(real)
    if "parallel.ep=2" in overrides:
        real, fake = [_together(real)], [_together(fake)]
    assert fake == real


def _together(ranks: Sequence[Moved]) -> Moved:
    total: Counter[Any] = Counter()
    for found in ranks:
        for key, (size, calls) in found.items():
            total[key, 0] += size
            total[key, 1] += calls
    return {key: [total[key, 0], total[key, 1]] for key, _ in total}


@pytest.mark.parametrize(("variant", "world", "overrides"), TRAINED, ids=lambda v: str(v))
@pytest.mark.slow
def test_memory_of_a_step(
    ranks: RankPool, toy: Callable[..., Path], variant: str, world: int, overrides: list[str]
) -> None:
    """Against what torch's allocator hands out."""
    folder = str(toy(variant))
    measured = ranks.run(peak_of_a_step, folder, overrides, world_size=world)
    ((*of_ranks,),) = ranks.run(simulated, folder, overrides, world, range(world), world_size=1)
    for rank, ((_, peaks), real) in enumerate(zip(of_ranks, measured, strict=True)):
        print(f"{variant} {overrides} rank {rank}: {peaks['passes'] / 1e6:.2f} MB, {real / 1e6:.2f} measured")
        assert peaks["passes"] == pytest.approx(real, rel=0.03)


def one_gpu(mode: str, variant: str) -> tuple[int, int]:
    """Bytes of a GPU that trains a toy: simulated, and counted by the benchmarks (`benchmarks.full_size`)."""
    from benchmarks.case import Case
    from benchmarks.full_size import count_ours
    from benchmarks.training_sides import recipe_of
    from recipes.simulate.rank import simulate_rank

    case = Case(variant, mode, 4096, recompute="selective", size="toy")
    counted = count_ours(case).peak
    return simulate_rank(recipe_of(case), case.model.geometry, 1, 0, microbatches=1).memory.total, counted


@pytest.mark.parametrize(("mode", "variant"), [("sft", "26b-a4b"), pytest.param("lora", "31b", marks=slow)])
def test_memory_of_one_gpu_is_what_is_counted(ranks: RankPool, mode: str, variant: str) -> None:
    ((told, counted),) = ranks.run(one_gpu, mode, variant, world_size=1)
    assert told == pytest.approx(counted, rel=0.03)


def both_ways(folder: str, overrides: list[str]) -> list[tuple[float, dict[str, float], int]]:
    """(seconds, where they go, bytes of the first stage) of a step, with all microbatches and with the fewest."""
    from bridge.geometry import Geometry
    from recipes.check import check_recipe
    from recipes.simulate.events import fewest_microbatches
    from recipes.simulate.hardware import load_hardware
    from recipes.simulate.rank import simulate_rank
    from recipes.simulate.timeline import step_time

    recipe, geometry = said(folder, overrides), Geometry.from_folder(Path(folder))
    layout, many = recipe.parallel.layout(), check_recipe(recipe, 2)
    found = []
    # Without launches: of every microbatch five kernels are outside of its passes (it is sent to the device, its sums
    # are added up), which rounds do not repeat.
    hardware = replace(load_hardware("h100"), kernel_us=0.0)
    for count in (many, fewest_microbatches(layout, many)):
        ranks = [simulate_rank(recipe, geometry, 2, rank, count) for rank in range(2)]
        step = step_time(ranks, layout, many, hardware)
        tokens = recipe.train.micro_batch_size * recipe.train.seq_length
        found.append((step.seconds, step.parts, ranks[0].memory.with_batches(many - count, tokens).total))
    return found


@pytest.mark.parametrize("overrides", [[], ["parallel.vpp=2"]], ids=["PP2", "VPP2"])
@pytest.mark.slow
def test_the_fewest_microbatches_tell_of_all(ranks: RankPool, toy: Callable[..., Path], overrides: list[str]) -> None:
    auto = [f"model.attention_backends.{kind}=auto" for kind in ("sliding", "global")]
    more = [*auto, "parallel.pp=2", "train.global_batch_size=20", "model.dtype=bfloat16", *overrides]
    ((whole, told),) = ranks.run(both_ways, str(toy("31b")), more, world_size=1)
    assert told[0] == pytest.approx(whole[0], rel=1e-3)
    assert told[1] == pytest.approx(whole[1], rel=1e-2, abs=1e-6)
    assert told[2] == pytest.approx(whole[2], rel=1e-3)


@pytest.mark.slow
def test_plan_simulates(toy: Callable[..., Path], tmp_path: Path) -> None:
    """The command line: proposals by their simulated seconds, the best one's picture."""
    import json
    from xml.etree import ElementTree

    from typer.testing import CliRunner

    from bridge.cli import app

    picture, result = tmp_path / "step.svg", tmp_path / "plan.json"
    sizes = ["--gpus", "16", "--seq-length", "256", "--global-batch-size", "16", "-n", "3"]
    options = ["--hardware", "h100", "--simulate", "--plot", str(picture), "--json", str(result)]
    done = CliRunner().invoke(app, ["plan", str(toy("26b-a4b")), *sizes, *options], catch_exceptions=False)
    assert done.exit_code == 0
    found = [row["simulated"] for row in json.loads(result.read_text())["proposals"]]
    assert len(found) == 3 and [row["seconds"] for row in found] == sorted(row["seconds"] for row in found)
    for row in found:
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], abs=1e-3)
        assert row["collectives"] and row["memory"]["weights"] > 0
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
