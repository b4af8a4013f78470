"""What the tests of weight sync run on ranks: a model that was trained a little, sent and saved, and memory counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operations make while they live: `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        for storage in _storages(result):
            if storage._cdata not in known:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            yield value.untyped_storage()


@dataclass
class Received:
    """What came to a rank: tensors by name, their Megatron names, and what was said ahead."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    megatron: dict[str, str] = field(default_factory=dict)
    ahead: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def as_said(self) -> bool:
        """Whether what came is what was said ahead, in dtype and shape."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()} == self.ahead


def receive(sync: Any, everything: bool | None = None) -> tuple[Received, Any, int]:
    """Send once into this process: (what came, what was sent, bytes allocated at most beside what came)."""
    from bridge.sync.send import CallbackSink

    got, mode = Received(), Allocations()

    def begin(buckets: Sequence[Any]) -> None:
        assert not got.tensors
        got.ahead = {t.name: (t.dtype, t.shape) for bucket in buckets for t in bucket.tensors}

    def take(described: Any, tensor: Tensor) -> None:
        with torch.utils._python_dispatch._disable_current_modes():  # what the receiver keeps is not the sender's
            got.tensors[described.name] = tensor.clone()
            got.megatron[described.name] = described.megatron

    with mode:
        sent = sync.send(CallbackSink(take, begin), everything=everything)
    return got, sent, mode.peak


def trained_run(folder: Path, parallel: dict[str, Any], steps: int, **keys: Any) -> Any:
    """On a rank: a run of the toy corpus after so many steps. `keys`: of the recipe, beside those."""
    from recipes.config import resolve
    from recipes.train.setup import assemble, start_ranks
    from recipes.train.step import clear_gradients, run_microbatches, update
    from tests.functional.training_kit import collate

    said = {
        "output": "unused",
        "parallel": parallel,
        "train": {"steps": max(1, steps), "global_batch_size": 2, "micro_batch_size": 1, "seq_length": 40},
        "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup": 0},
    } | {name: value for name, value in keys.items() if name != "model"}
    said["model"] = {"hf": str(folder), "dtype": "float32", **keys.get("model", {})}
    start_ranks()
    run = assemble(resolve(said), 1, load=True)
    dp = run.groups.dp
    for step in range(steps):
        clear_gradients(run)
        rows = range(2 * step, 2 * step + 2)
        mine = [row for row in rows if row % dp.size() == dp.rank()]
        batches = [collate(run.bridge.geometry, 1, range(row, row + 1)) for row in mine]
        run_microbatches(run, batches, train=True)
        run.scheduler.step(1)
        update(run, float("inf"))
    return run


@dataclass
class SyncResult:
    """Of one rank: names whose bytes are not the saved folder's, and the counts that the tests bound."""

    names: list[str]
    wrong: list[str]
    megatron: dict[str, str]
    as_said: bool
    buckets: int
    again: list[str]
    again_wrong: list[str]
    peak: int
    largest: int


def sync_and_save(
    folder: Path, parallel: dict[str, Any], bucket_bytes: int, ranks: tuple[int, ...], out: Path, freeze: list[str]
) -> SyncResult:
    """On a rank: train a step, send everything, train another step's worth of change, send what changes; save."""
    from safetensors.torch import load_file

    run = trained_run(folder, parallel, 1, model={"freeze": freeze})
    sync = run.bridge.weight_sync(run.chunks, ranks=ranks, bucket_bytes=bucket_bytes)
    first, sent, peak = receive(sync)
    run.bridge.save_hf(run.models, out, max_shard_size=1 << 40)
    saved = load_file(out / "model.safetensors") if sync.receives else {}
    wrong = [name for name, tensor in first.tensors.items() if not torch.equal(tensor, saved[name])]
    with torch.no_grad():
        for model in run.models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(2)
    again, _, second_peak = receive(sync)
    again_wrong = [name for name, tensor in again.tensors.items() if name not in saved]
    moved = [name for name, tensor in again.tensors.items() if not torch.equal(tensor, saved.get(name, tensor))]
    still = [name for name, tensor in saved.items() if name not in again.tensors]
    whole, _, _ = receive(sync, everything=True)
    again_wrong += [name for name in still if not torch.equal(whole.tensors.get(name, saved[name]), saved[name])]
    again_wrong += [name for name in again.tensors if not torch.equal(whole.tensors[name], again.tensors[name])]
    largest = max(bucket.nbytes for bucket in sync.plan(everything=True))
    return SyncResult(
        sorted(first.tensors),
        wrong,
        first.megatron,
        first.as_said and again.as_said,
        sent.buckets,
        sorted(moved),
        again_wrong,
        max(peak, second_peak),
        largest,
    )


@dataclass
class AdapterResult:
    """Of one rank: what came of the weights with adapters in them, and of the adapters alone by format."""

    merged: dict[str, Tensor]
    again: list[str]
    only: dict[str, dict[str, Tensor]]
    peak: int
    largest: int


def sync_adapters(folder: Path, run_folder: Path, parallel: dict[str, Any], lora: dict[str, Any]) -> AdapterResult:
    """On a rank: a LoRA run with values, saved, and sent with its adapters merged and alone; `merged` is saved too."""
    from tests.functional.adapter_kit import saved_run

    run = saved_run(folder, run_folder, parallel, lora)
    run.bridge.save_hf(run.models, run_folder.with_name("merged"), max_shard_size=1 << 40)
    sync = run.bridge.weight_sync(run.models, bucket_bytes=1 << 17)
    merged, _, peak = receive(sync)
    again, _, _ = receive(sync)
    only = {}
    for name in ("peft", "vllm", "sglang"):
        alone = run.bridge.weight_sync(run.models, adapters="only", adapter_format=name, bucket_bytes=1 << 16)
        only[name] = receive(alone)[0].tensors
        assert set(receive(alone)[0].tensors) == set(only[name])  # nothing of an adapter is frozen
    largest = max(bucket.nbytes for bucket in sync.plan(everything=True))
    return AdapterResult(merged.tensors, sorted(again.tensors), only, peak, largest)


def fail_while_sending(folder: Path, rank: int) -> tuple[str, list[str]]:
    """On a rank: the sink of one rank raises at its second bucket; (what is raised here, what was called)."""
    from bridge import Gemma4Bridge
    from bridge.megatron.parallel import Parallel
    from bridge.sync.send import CallbackSink

    class Failing(CallbackSink):
        called: list[str] = []  # noqa: RUF012

        def take(self, bucket: Any, views: Any) -> None:
            self.called.append("take")
            if len(self.called) == 2 and torch.distributed.get_rank() == rank:
                raise OSError(28, "No space left on device")

        def abort(self) -> None:
            self.called.append("abort")

    bridge = Gemma4Bridge.from_hf(folder)
    model = bridge.build(bridge.provider(Parallel(tp=2), torch.float32, overrides={"perform_initialization": False}))
    bridge.load_hf_weights(model)
    sync, sink = bridge.weight_sync(model, ranks=None, bucket_bytes=1 << 19), Failing(lambda *_: None)
    Failing.called = []
    try:
        sync.send(sink)
    except Exception as error:
        return f"{type(error).__name__}: {error}", sink.called
    return "", sink.called


def refused(folder: Path) -> list[str]:
    """On a rank: what the wrong options of a sync are told."""
    from bridge import Gemma4Bridge
    from bridge.errors import UsageError
    from bridge.megatron.parallel import Parallel

    bridge = Gemma4Bridge.from_hf(folder)
    model = bridge.build(bridge.provider(Parallel(), torch.float32, overrides={"perform_initialization": False}))
    said = []
    for options in ({"ranks": (1,)}, {"ranks": ()}, {"bucket_bytes": 0}, {"adapters": "only"}, {"adapters": "no"}, {}):
        try:
            bridge.weight_sync(model, **options).send(None if not options else sink_of_nothing())
            said.append("")
        except UsageError as error:
            said.append(str(error))
    return said


def sink_of_nothing() -> Any:
    from bridge.sync.send import CallbackSink

    return CallbackSink(lambda *_: None)
