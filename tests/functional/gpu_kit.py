"""What the GPU tests do, on any device: `test_gpu.py` calls it at real widths, `test_gpu_kit.py` on a CPU with toys."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.case import Case
from benchmarks.random_model import RandomModel, random_batches
from benchmarks.training_sides import recipe_of
from bridge.verify.parity import kl_divergence

ROOT = Path(__file__).parents[2]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Distance:
    """Of our logits from transformers': the largest difference by the largest logit, and the mean KL divergence."""

    relative: float
    kl: float


def logits_distance(model: RandomModel, length: int, layer_spec: str = "local", rows: int = 128) -> Distance:
    """Both models on one row of text, one after the other, so that a device need not hold both."""
    (batch,) = islice(random_batches(model.geometry, length), 1)
    ids = batch["input_ids"].to(device())
    with torch.no_grad():
        ours = _our_logits(model, ids, layer_spec)
        release()
        theirs = _their_logits(model, ids)
    release()
    difference = largest = total = 0.0
    for a, b in zip(ours.split(rows), theirs.split(rows), strict=True):
        a, b = a.float(), b.float()
        difference = max(difference, float((a - b).abs().max()))
        largest = max(largest, float(b.abs().max()))
        total += kl_divergence(b, a) * len(a)
    return Distance(difference / largest, total / length)


def _our_logits(model: RandomModel, ids: Tensor, layer_spec: str) -> Tensor:
    from bridge.megatron.parallel import initialize
    from recipes.train.setup import start_ranks

    start_ranks()
    bridge = model.bridge()
    options = {"overrides": {"perform_initialization": False}, "layer_spec": layer_spec}
    provider = bridge.provider(dtype=model.dtype, **options)
    groups = initialize(provider.parallel)
    (chunk,) = provider.build(groups)
    bridge.load_hf_weights([chunk])
    logits: Tensor = chunk.eval()(ids)[0]
    return logits


def _their_logits(model: RandomModel, ids: Tensor) -> Tensor:
    experts = {"experts_implementation": "eager"} if model.geometry.moe is not None else {}
    hf = model.transformers_model(device(), attn_implementation="eager", **experts)
    logits: Tensor = hf.eval()(input_ids=ids, use_cache=False).logits[0]
    return logits


def release() -> None:
    """Let go of what the last model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


def build(case: Case, lora: Mapping[str, Any] | None = None, **changes: Any) -> Any:
    """A run of the case; `lora`, `changes`: to the groups `lora` and `train` of its recipe."""
    from recipes.check import check_recipe
    from recipes.train.setup import assemble, start_ranks

    recipe = recipe_of(case)
    recipe.train = replace(recipe.train, **changes)
    recipe.lora = replace(recipe.lora, **(lora or {}))
    start_ranks()
    return assemble(recipe, check_recipe(recipe, 1), load=True, bridge=case.model.bridge())


def train(run: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """One step of the run; its mean loss."""
    from recipes.train.step import clear_gradients, reduce_sums, run_microbatches, update

    clear_gradients(run)
    total, tokens, *_ = reduce_sums(run_microbatches(run, batches, train=True))
    run.scheduler.step(1)
    update(run, float("inf"))
    return total / tokens


def trained(case: Case, steps: int) -> tuple[list[float], list[Tensor]]:
    """Losses, and the trained parameters on the CPU, of a run of its own, deterministic."""
    run = build(case, deterministic=True)
    batches = case.batches()
    try:
        losses = [train(run, list(islice(batches, run.microbatches))) for _ in range(steps)]
    finally:
        torch.use_deterministic_algorithms(False)
    values = [p.detach().cpu().clone() for model in run.models for p in model.parameters() if p.requires_grad]
    return losses, values


def memory_after_steps(case: Case, steps: int) -> list[int]:
    """Bytes that the device's allocator has given out after every step (of a CPU, those of the optimizer's tensors)."""
    run = build(case)
    batches, found = case.batches(), []
    for _ in range(steps):
        train(run, list(islice(batches, run.microbatches)))
        found.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else _tensors())
    return found


def _tensors() -> int:
    gc.collect()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if type(t) is torch.Tensor
    }
    return sum(held.values())


class HostReads(TorchDispatchMode):
    """Counts the operations for which a host has to wait for its device, by the line that asked for them.

    A CPU's tensors are all alike: of those that are read there, some are on the host of a GPU run too.
    """

    _WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in self._WAIT or masked or (name == "repeat_interleave" and not isinstance(args[-1], int)):
            self.places[f"{_asked_by()}: {name}"] += 1
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _asked_by() -> str:
    """The innermost function of this project, or of Megatron, on the stack."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        for root in ("bridge/", "recipes/", "megatron/core/"):
            if f"/{root}" in path and "/tests/" not in path:
                return f"{root}{path.rpartition(f'/{root}')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a GPU, raise where the host waits for it."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def forward_and_backward(run: Any, batches: Sequence[dict[str, Tensor]]) -> None:
    """What must not wait: all of a step but the sums at its end and the update."""
    from recipes.train.step import clear_gradients, run_microbatches

    clear_gradients(run)
    with no_waiting():
        run_microbatches(run, batches, train=True)
