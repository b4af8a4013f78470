"""A recipe on a cluster that is not there: its distinct ranks, simulated in processes of this machine.

Which ranks are distinct: those of a pipeline differ, each has its own layers and its own turn. Tensor-parallel,
expert-parallel and data-parallel ranks do the same operations on tensors of the same shapes (a vocabulary is filled
up, buckets are padded, tokens are spread evenly), so one speaks for all of them. Context-parallel ranks hold as many
tokens each; the first has the last chunk of the row and so keeps the most keys: it speaks for the others as a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridge.errors import ParallelError, UsageError
from bridge.geometry import Geometry
from bridge.megatron.layout import check_layout
from bridge.megatron.parallel import Parallel
from bridge.ranks import PRELOAD, RankPool
from recipes.check import check_recipe
from recipes.config import Recipe
from recipes.memory.estimate import RESERVE
from recipes.simulate.events import SimulatedRank, fewest_microbatches
from recipes.simulate.hardware import Hardware
from recipes.simulate.timeline import StepTime, collectives, purpose_of, step_time

WORLD_LIMIT = 1024
# One process a core of the smallest login node.
PROCESSES = 2


@dataclass(frozen=True)
class Simulation:
    """A step of `recipe` on `world_size` GPUs: one rank of each pipeline stage, in order."""

    recipe: Recipe
    parallel: Parallel
    world_size: int
    microbatches: int
    ranks: tuple[SimulatedRank, ...]

    @property
    def fullest(self) -> SimulatedRank:
        """The rank that holds the most."""
        return max(self.ranks, key=lambda rank: rank.memory.total)

    @property
    def need(self) -> int:
        """Bytes of a GPU, with what CUDA and NCCL are taken to need."""
        return self.fullest.memory.total + RESERVE

    def time(self, hardware: Hardware) -> StepTime:
        """Seconds of a step."""
        return step_time(self.ranks, self.parallel, self.microbatches, hardware)

    @property
    def tokens(self) -> int:
        """Of a step, rows being full."""
        return self.recipe.train.global_batch_size * self.recipe.train.seq_length

    def traffic(self) -> dict[tuple[int, str, str], tuple[int, int]]:
        """(bytes, calls) by stage, purpose and kind, of the microbatches that were simulated."""
        found: dict[tuple[int, str, str], tuple[int, int]] = {}
        for rank in self.ranks:
            for event in collectives(rank.events):
                key = rank.pp_rank, purpose_of(event), event.kind
                size, calls = found.get(key, (0, 0))
                found[key] = size + event.size, calls + 1
        return found


class Simulator:
    """Processes that simulate ranks; they are started once. A context manager."""

    def __init__(self, processes: int = PROCESSES) -> None:
        self._pool = RankPool(processes, preload=(*PRELOAD, "recipes.simulate.rank"), device="cpu", timeout_s=3600)

    def __enter__(self) -> Simulator:
        return self

    def __exit__(self, *error: Any) -> None:
        self._pool.close()

    def run(self, recipes: Sequence[Recipe], geometry: Geometry, world_size: int) -> list[Simulation]:
        """A step of each recipe on so many GPUs. Raises a BridgeError."""
        if world_size > WORLD_LIMIT:
            raise ParallelError(f"{world_size} GPUs: at most {WORLD_LIMIT} can be simulated")
        tasks = []
        for recipe in recipes:
            check_simulable(recipe)
            check_layout(geometry, recipe.parallel.layout())
            check_recipe(recipe, world_size)
            tasks += [(recipe, rank) for rank in representatives(recipe.parallel.layout(), world_size)]
        done: dict[int, SimulatedRank] = {}
        for part in self._pool.run(_simulate, tasks, geometry, world_size):
            done |= part
        found, ranks = [], iter(done[i] for i in range(len(tasks)))
        for recipe in recipes:
            layout = recipe.parallel.layout()
            replica = tuple(next(ranks) for _ in range(layout.pp))
            found.append(Simulation(recipe, layout, world_size, check_recipe(recipe, world_size), replica))
        return found


def check_simulable(recipe: Recipe) -> None:
    """Raise UsageError for what a simulated step would leave out, or cannot do without a GPU."""
    model = recipe.model
    for key, given, why in (
        ("preference.loss", recipe.preference.loss, "its rows and its reference are not simulated"),
        ("grpo.rewards", recipe.grpo.rewards, "answers are not simulated"),
        ("distill.teacher", recipe.distill.teacher, "the teacher is not simulated"),
        ("drafter.path", recipe.drafter.path, "drafters are not simulated"),
        ("model.layer_spec", model.layer_spec != "local" and model.layer_spec, "needs Transformer Engine on a GPU"),
        ("model.fp8", model.fp8 != "none" and model.fp8, "needs Transformer Engine on a GPU"),
        ("model.fp8_experts", model.fp8_experts, "needs a GPU"),
    ):
        if given:
            raise UsageError(f"{key}={given}: {why}; leave it out of what is simulated")


def representatives(parallel: Parallel, world_size: int) -> list[int]:
    """The first rank of each stage: Megatron numbers pipeline ranks last."""
    return [stage * (world_size // parallel.pp) for stage in range(parallel.pp)]


def _simulate(tasks: Sequence[tuple[Recipe, int]], geometry: Geometry, world_size: int) -> dict[int, SimulatedRank]:
    """This process's share of the ranks, by their number among the tasks."""
    import torch.distributed as dist

    from recipes.simulate.rank import simulate_rank

    # Each leaves this group for one of its own: not before the others are in it.
    dist.barrier()
    assigned = range(dist.get_rank(), len(tasks), dist.get_world_size())
    done = {}
    for number in assigned:
        recipe, rank = tasks[number]
        layout = recipe.parallel.layout()
        all_of_them = check_recipe(recipe, world_size)
        count = fewest_microbatches(layout, all_of_them)
        one = simulate_rank(recipe, geometry, world_size, rank, count)
        tokens = recipe.train.micro_batch_size * recipe.train.seq_length
        done[number] = replace(one, memory=one.memory.with_batches(all_of_them - count, tokens))
    return done


def with_layout(recipe: Recipe, parallel: Parallel, recompute: str, modules: Sequence[str]) -> Recipe:
    """The recipe in another layout."""
    changed = replace(
        recipe.parallel, **vars(parallel), recompute=recompute, recompute_modules=list(modules or ["core_attn"])
    )
    return replace(recipe, parallel=changed)


def flops_of(recipe: Recipe, geometry: Geometry) -> float:
    """Of a step, as `training_flops` counts them for MFU: what is recomputed does not count."""
    import torch

    from recipes.train.workload import training_flops

    row = torch.zeros(1, recipe.train.seq_length, dtype=torch.int64)
    batch = {"input_ids": row, "labels": row}
    adapters = bool(recipe.lora.rank or recipe.lora.adapter)
    return recipe.train.global_batch_size * training_flops(geometry, [batch], adapters=adapters)


@dataclass(frozen=True)
class Forecast:
    """A step on a kind of hardware. Seconds, tokens/s of all GPUs, MFU, and of `steps`: GPU-hours and dollars."""

    simulation: Simulation
    hardware: Hardware
    step: StepTime
    flops: float

    @property
    def seconds(self) -> float:
        return self.step.seconds

    @property
    def span(self) -> tuple[float, float]:
        """The least and the most seconds, by the profile's uncertainty."""
        doubt = self.hardware.uncertainty
        return self.seconds * (1 - doubt), self.seconds * (1 + doubt)

    @property
    def tokens_per_s(self) -> float:
        return self.simulation.tokens / self.seconds

    @property
    def mfu(self) -> float:
        return self.flops / self.seconds / self.simulation.world_size / (self.hardware.peak_tflops * 1e12)

    def gpu_hours(self, steps: int) -> float:
        return steps * self.seconds * self.simulation.world_size / 3600

    def dollars(self, steps: int) -> float:
        return self.gpu_hours(steps) * self.hardware.dollars_per_gpu_hour

    @property
    def fits(self) -> bool:
        return self.simulation.need <= self.hardware.bytes


def forecast(simulation: Simulation, geometry: Geometry, hardware: Hardware) -> Forecast:
    """What a simulated step takes on that hardware."""
    return Forecast(simulation, hardware, simulation.time(hardware), flops_of(simulation.recipe, geometry))


def why(best: Forecast, other: Forecast) -> str:
    """What another layout loses, and where."""
    mine, theirs = best.step.parts, other.step.parts
    change = {name: theirs.get(name, 0.0) - mine.get(name, 0.0) for name in {*mine, *theirs}}
    lost = sorted((name for name in change if change[name] > 0), key=lambda name: -change[name])[:2]
    said = ", ".join(f"{change[name]:.2f} s more in {name}" for name in lost) or "nothing stands out"
    return f"{other.simulation.parallel} takes {other.seconds - best.seconds:+.2f} s: {said}"
