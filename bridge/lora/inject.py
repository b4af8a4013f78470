"""Adapters put into a live Megatron model, and their values.

A model is built, gets its adapters, is filled, and only then wrapped in DDP: the base is frozen by then and takes no
gradient buffer. Which rows of which weight a rank holds is what the model's sharded state dict says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor

from bridge.convert.live import METADATA, load_from_hf
from bridge.errors import UsageError
from bridge.hf.tensors import TensorSpec
from bridge.lora.embedding import EmbeddingAdapter
from bridge.lora.linear import ExpertAdapter, LinearAdapter, Placement
from bridge.lora.spec import Factor, Target
from bridge.lora.table import Adapted, AdapterTable, Values, part_name, peft_view
from bridge.megatron.linear import Split
from bridge.megatron.model import Gemma4Model
from bridge.megatron.moe import GroupedExperts
from bridge.megatron.ple import share_over_stages


def attach(models: Sequence[Gemma4Model], table: AdapterTable) -> None:
    """Freeze the chunks of a model, but `modules_to_save`, and give them adapters, all zero as yet (see `fill`).

    Raises UsageError for a weight whose module has no place for one.
    """
    for model in models:
        model.adapter_table = table
        model.requires_grad_(False)
        owners = {id(p): (m, name) for m in model.modules() for name, p in m.named_parameters(recurse=False)}
        for item in model.sharded_state_dict(metadata=dict(METADATA)).values():
            adapted = table.adapted.get(getattr(item, "key", ""))
            if adapted is None:
                continue
            if adapted.saved:
                item.data.requires_grad_(True)
                continue
            module, name = owners[id(item.data)]
            if adapted.embedding and not isinstance(module, VocabParallelEmbedding):
                continue  # a tied head's copy on the last stage, which stays the base's
            if not isinstance(getattr(module, "adapters", None), torch.nn.ModuleDict):
                raise UsageError(f"lora: {item.key} has no place for an adapter")
            module.adapters[name] = _adapter(module, name, item, adapted)


def _adapter(
    module: torch.nn.Module, name: str, item: ShardedTensor | ShardedTensorFactory, adapted: Adapted
) -> torch.nn.Module:
    weight = getattr(module, name)
    if isinstance(module, GroupedExperts):
        (target,) = adapted.targets.values()
        of_expert: Split = "column" if name == "linear_fc1" else "row"
        return ExpertAdapter(weight, adapted.rank, target.scaling, of_expert, module.pg_collection.expt_tp)
    boxes = item.build() if isinstance(item, ShardedTensorFactory) else [item]
    shared = adapted.weight.row.shard.index("pp") if "pp" in adapted.weight.row.shard else None
    if isinstance(module, VocabParallelEmbedding):
        (target,) = adapted.targets.values()
        table = EmbeddingAdapter(module, adapted.rank, target.scaling, target.dora)
        if shared is not None:
            share_over_stages(table.lora_A, first=boxes[0].global_offset[shared] == 0)
        return table
    split: Split = getattr(module, "split", None)
    sequence_parallel = module.sequence_parallel if split else getattr(weight, "sequence_parallel", False)
    placement = Placement(split, module.tp_group if split else None, bool(sequence_parallel))  # type: ignore[arg-type]
    targets = [adapted.targets[source] for source in adapted.order]
    rows = [range(box.global_offset[0], box.global_offset[0] + box.local_shape[0]) for box in boxes]
    adapter = LinearAdapter(
        weight,
        adapted.rank,
        _projections(rows, adapted),
        [target.scaling for target in targets],
        placement,
        [target.dropout for target in targets],
        targets[0].dora,
    )
    if shared is not None:
        # The rows of B are split over the stages, and each has an A of its own that must stay the same.
        share_over_stages(adapter.lora_A, first=boxes[0].global_offset[shared] == 0)
    return adapter


def _projections(rows: Sequence[range], adapted: Adapted) -> Tensor:
    """Of each row that a rank holds of a weight: the number of its projection among those adapted, or -1."""
    whole = torch.full((adapted.weight.shape[0],), -1, device="cpu")
    for block in adapted.weight.blocks:
        if block.source in adapted.targets:
            whole[block.row : block.row + block.num_rows] = adapted.order.index(block.source)
    return torch.cat([whole[held.start : held.stop] for held in rows])


def fill(models: Sequence[Gemma4Model], table: AdapterTable, values: Values) -> None:
    """Give the adapters of this rank their parts of `values`, which are asked for tensor by tensor."""
    load_from_hf(models, table, _Reader(table, values))


def start_magnitudes(models: Sequence[Gemma4Model]) -> None:
    """Give DoRA's magnitudes the norms of the weights with their factors as they are. Collective."""
    for model in models:
        for module in model.modules():
            for name, adapter in getattr(module, "adapters", {}).items():
                if not isinstance(adapter, ExpertAdapter):
                    adapter.start_magnitude(getattr(module, name))


class _Reader:
    """Canonical tensors as a `RowReader` of the table's own, with their filling; one is kept at a time."""

    def __init__(self, table: AdapterTable, values: Values) -> None:
        self._values = values
        self._source: dict[str, tuple[Target, Factor]] = {}
        self.tensors: dict[str, TensorSpec] = {}
        for adapted in table.adapted.values():
            for target in adapted.targets.values():
                for part in target.parts:
                    name = part_name(target.name, part)
                    self._source[name] = target, part
                    entry, index = table.by_hf_name[name]
                    self.tensors[name] = TensorSpec(name, "F32", entry.sources[index].shape)
        self._last: tuple[str, Tensor] = ("", torch.empty(0))

    def read_rows(self, name: str, start: int, stop: int, out: Any) -> None:
        """See `RowReader`."""
        if self._last[0] != name:
            target, part = self._source[name]
            whole = torch.zeros(self.tensors[name].shape)
            peft_view(whole, target, part).copy_(self._values(target, part))
            self._last = (name, whole)
        rows = self._last[1][start:stop].contiguous().view(torch.uint8).flatten()
        torch.from_numpy(np.frombuffer(out, dtype=np.uint8)).copy_(rows)


@contextmanager
def disabled(models: Sequence[Gemma4Model]) -> Iterator[None]:
    """The base alone, in the same weights, while the context lasts: what it says needs no second copy of it.

    Raises UsageError where weights of the base are trained themselves.
    """
    parameters = [(name, p) for model in models for name, p in model.named_parameters()]
    trained = [name for name, p in parameters if p.requires_grad and ".adapters." not in name]
    if trained:
        raise UsageError(f"{trained[0]} is trained itself (lora.modules_to_save): the base's values are no more")
    held = [(m, m.adapters) for model in models for m in model.modules() if len(getattr(m, "adapters", ()))]
    for module, _ in held:
        module.adapters = torch.nn.ModuleDict()
    try:
        yield
    finally:
        for module, adapters in held:
            module.adapters = adapters
