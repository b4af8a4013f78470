"""One rank of a world, at full size, through a step of the training loop's own passes, on a fake device."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch.testing._internal.distributed.fake_pg import FakeStore

from bridge import Gemma4Bridge
from bridge.geometry import Geometry
from bridge.mapping import table_for
from recipes.check import check_recipe
from recipes.config import Recipe
from recipes.simulate.events import Memory, SimulatedRank
from recipes.simulate.fake_device import FakeDevice
from recipes.simulate.stand_ins import DEVICE
from recipes.simulate.trace import Trace
from recipes.train.setup import Run, assemble
from recipes.train.step import clear_gradients, reduce_sums, run_microbatches, update

# What is behind a place in the code, by the first text that is in its name.
_KINDS = (
    ("megatron/loss", "loss"),
    ("cross_entropy", "loss"),
    ("moe", "experts"),
    ("local_dispatch", "experts"),
    ("attention", "attention"),
    ("visibility", "masks"),
    ("mask.py", "masks"),
    ("exchange", "context parallelism"),
    ("p2p_communication", "pipeline"),
    ("pipeline", "pipeline"),
    ("rope", "attention"),
    ("norm", "norms"),
    ("ple.py", "per-layer inputs"),
    ("activation", "mlp"),
    ("geglu", "mlp"),
    ("mlp", "mlp"),
    ("tensor_parallel/layers", "linears"),
    ("bridge/megatron/linear", "linears"),
    ("mappings", "gathered sequences"),
    ("bridge/megatron/layer", "hidden states"),
    ("bridge/megatron/block", "hidden states"),
    ("bridge/megatron/model", "hidden states"),
    ("embedding", "hidden states"),
    ("core/distributed", "gradients"),
    ("random.py", "recompute"),
    ("optimizer", "optimizer"),
    ("torch/optim", "optimizer"),
)


class _Empty(Gemma4Bridge):
    """A model whose weights stay as they are made."""

    def load_hf_weights(self, model: Sequence[torch.nn.Module]) -> None: ...


def simulate_rank(
    recipe: Recipe, geometry: Geometry, world_size: int, rank: int, microbatches: int | None = None, gpu: bool = True
) -> SimulatedRank:
    """A step of `rank` of `world_size`. `microbatches`: in the place of the recipe's; `gpu`: or as on a CPU.

    torch.distributed is of that world while this runs, and of none afterwards. Raises a BridgeError.
    """
    microbatches = microbatches or check_recipe(recipe, world_size)
    recipe, of_optimizer = _without_precision_aware(recipe)
    with _fake_world(rank, world_size), FakeDevice(gpu) as device, _without_collector():
        run = assemble(recipe, microbatches, load=True, bridge=_Empty(geometry, table_for(geometry)))
        # The first update makes the optimizer's state.
        run.scheduler.step(1)
        update(run, float("inf"))
        gc.collect()
        device.restart()
        before = device.snapshot().at_peak
        device.restart()
        device.trace.restart()
        peaks = {}
        with _marks(run.models, device.trace):
            clear_gradients(run)
            sums = run_microbatches(run, [_batch(recipe, geometry)] * microbatches, train=True)
            peaks["passes"] = device.snapshot()
            device.restart()
            with device.trace.marked("update"):
                reduce_sums(sums)
                run.scheduler.step(1)
                update(run, float("inf"))
            peaks["update"] = device.snapshot()
        moment = max(peaks, key=lambda name: peaks[name].peak)
        weights, gradients, optimizer = _persistent(run, sum(before.values()))
        at_peak = _by_kind(peaks[moment].at_peak, before)
        memory = Memory(weights, gradients, round(optimizer * of_optimizer), at_peak, moment)
        peak_beyond = {name: found.peak - sum(before.values()) for name, found in peaks.items()}
        return SimulatedRank(rank, run.groups.pp.rank(), microbatches, memory, peak_beyond, device.trace.events)


def _without_precision_aware(recipe: Recipe) -> tuple[Recipe, float]:
    """A recipe whose optimizer is torch's, and what Transformer Engine's takes of its bytes: 6 or 10 of 12 of a trained
    parameter (2 of a second half of the weight, and two moments). Theirs needs a GPU to be made."""
    said = recipe.optimizer
    if not said.precision_aware:
        return recipe, 1.0
    moments = 4 if said.moments_dtype == "bfloat16" else 8
    plain = replace(said, precision_aware=False, moments_dtype="float32")
    return replace(recipe, optimizer=plain), (2 + moments) / (12 if recipe.model.dtype == "bfloat16" else 8)


def _batch(recipe: Recipe, geometry: Geometry) -> dict[str, torch.Tensor]:
    """A microbatch of whole rows of text, on the host."""
    shape = recipe.train.micro_batch_size, recipe.train.seq_length
    ids = torch.full(shape, _ordinary(geometry))
    return {"input_ids": ids, "labels": ids}


def _ordinary(geometry: Geometry) -> int:
    """A token that is text."""
    return next(i for i in range(8, geometry.vocab_size) if i not in geometry.placeholder_ids)


@contextmanager
def _fake_world(rank: int, world_size: int) -> Iterator[None]:
    """Process groups whose other members do not exist."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(f"cpu:fake,{DEVICE.type}:fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextmanager
def _without_collector() -> Iterator[None]:
    """What lives on in rings of objects is held in training too, and counts."""
    gc.disable()
    # What was there before is not looked through again.
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
        gc.collect()


class _Marks:
    """Megatron's `config.timers`, which its schedules start and stop: where a pass of a microbatch begins and ends."""

    def __init__(self, trace: Trace) -> None:
        passes = {"forward-compute": "forward", "backward-compute": "backward"}
        self._timers = {name: _Mark(trace, said) for name, said in passes.items()}

    def __call__(self, name: str, log_level: int | None = None) -> _Mark:
        return self._timers.get(name) or _Mark()


class _Mark:
    """One of these timers; without a trace it does nothing."""

    def __init__(self, trace: Trace | None = None, name: str = "") -> None:
        self._trace, self._name, self._stack = trace, name, ExitStack()

    def start(self, barrier: bool = False) -> None:
        if self._trace is not None:
            self._stack.enter_context(self._trace.marked(self._name))

    def stop(self, barrier: bool = False) -> None:
        self._stack.close()


@contextmanager
def _marks(models: Sequence[torch.nn.Module], trace: Trace) -> Iterator[None]:
    """Have Megatron's schedules mark the passes."""
    configs, timers = [get_model_config(model) for model in models], _Marks(trace)
    for config in configs:
        config.timers = timers
    try:
        yield
    finally:
        for config in configs:
            config.timers = None


def _persistent(run: Run, held: int) -> tuple[int, int, int]:
    """Bytes of weights, of gradients and of the rest, which is the optimizer's, of what is `held` between steps."""
    weights, gradients = {}, {}
    for model in run.models:
        for tensor in (*model.parameters(), *model.buffers()):
            weights[id(tensor.untyped_storage())] = tensor.untyped_storage()
            if (gradient := getattr(tensor, "main_grad", None)) is not None:
                gradients[id(gradient.untyped_storage())] = gradient.untyped_storage()
    sizes = [sum(storage.nbytes() for storage in found.values()) for found in (weights, gradients)]
    return sizes[0], sizes[1], held - sum(sizes)


def _by_kind(at_peak: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    """What is held beside `before`, by kind, the most first."""
    found: dict[str, int] = {}
    for place, size in at_peak.items():
        kind = next((kind for text, kind in _KINDS if text in place), "other")
        found[kind] = found.get(kind, 0) + size - before.get(place, 0)
    return dict(sorted(((kind, size) for kind, size in found.items() if size), key=lambda each: -each[1]))
