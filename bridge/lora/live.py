"""The weights of a live model with its adapters in them: what an inference engine takes, and `save_hf` writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from bridge.convert.live import Gatherer
from bridge.errors import UsageError
from bridge.lora.merge import Factors
from bridge.lora.table import Adapted, AdapterTable, canonical, part_name
from bridge.mapping import Table

Adapters = Literal["merge", "leave"]


def open_gatherer(model: Sequence[torch.nn.Module], table: Table, adapters: str) -> Gatherer:
    """What gathers the weights of a live model; "merge" or "leave" its adapters, if it has any. Collective.

    The weights are those of the last update: under `overlap_param_gather` they are waited for.
    Raises UsageError for another word, and what any rank raises.
    """
    if adapters not in get_args(Adapters):
        raise UsageError(f"adapters={adapters!r}: known are {', '.join(get_args(Adapters))}")
    for wait in _parameter_syncs(model):
        wait(force_sync=True)
    held = [chunk.adapter_table for chunk in map(unwrap_model, model)]
    if not held or held[0] is None or adapters == "leave":
        return Gatherer(model, table)
    return MergedGatherer(model, table, held[0])


def _parameter_syncs(model: Sequence[torch.nn.Module]) -> list[Callable[..., None]]:
    """With overlap, DDP gathers what other ranks have updated during the next forward pass: these do it now.

    Megatron's config knows the function of a chunk that is given without its DDP.
    """
    found: dict[Any, None] = {}
    for chunk in model:
        ddp: Any = getattr(chunk, "ddp_config", None)
        known: Any = chunk.start_param_sync if ddp is not None and ddp.overlap_param_gather else None
        if ddp is None:
            known = unwrap_model(chunk).config.param_sync_func
        found |= dict.fromkeys(known if isinstance(known, list) else [known])
    return [function for function in found if function is not None]


class MergedGatherer(Gatherer):
    """`Gatherer` of a model's weights, W + scaling · B A in the place of W: float32, rounded once to the dtype of W.

    What `lora.merge` makes of the same adapter on disk. The adapters of one Megatron tensor are in memory at a time.
    """

    def __init__(self, model: Sequence[torch.nn.Module], table: Table, adapters: AdapterTable) -> None:
        super().__init__(model, table)
        # What is trained whole is in the model itself.
        self._factors_table = adapters.factors()
        self._factors = Gatherer(model, self._factors_table)
        self._last: tuple[str, dict[int, Factors]] = "", {}
        for target in self._factors_table.targets:
            if target.kind == "embedding" and table.copies_of(target.name) and self._rank == 0:
                # PEFT warns of it and does the same.
                warnings.warn(
                    f"{target.module} is tied to the head, which gets its adapter too: in training it had none",
                    stacklevel=2,
                )

    def rows(self, key: str, start: int, stop: int, dst: int | None = None) -> Tensor | None:
        """See `Gatherer.rows`."""
        rows = super().rows(key, start, stop, dst)
        adapted = self._factors_table.adapted.get(key)
        if adapted is None:
            return rows
        if self._last[0] != key:
            self._last = key, {}  # before others are made
            self._last = key, self._read(key, adapted, dst)
        if rows is not None:
            for block in adapted.weight.blocks:
                low, high = max(start, block.row), min(stop, block.row + block.num_rows)
                if low < high and block.source in self._last[1]:
                    part = rows[low - start : high - start]
                    part.copy_(self._last[1][block.source].merged(part, block.source_row + low - block.row))
        return rows

    def _read(self, key: str, adapted: Adapted, dst: int | None) -> dict[int, Factors]:
        """The factors of each adapted source of a Megatron tensor, on the ranks that receive. Collective."""
        values: dict[int, list[Tensor]] = {source: [] for source in adapted.order}
        for part in adapted.parts:
            names = {source: part_name(adapted.targets[source].name, part) for source in adapted.order}
            entry, _ = self._factors_table.by_hf_name[names[adapted.order[0]]]
            whole = self._factors.rows(entry.key, 0, entry.shape[0], dst)
            for source, name in names.items() if whole is not None else ():
                _, index = self._factors_table.by_hf_name[name]
                assert whole is not None
                values[source].append(canonical(entry, index, whole, adapted.targets[source], part))
        weight_dtype = self.owners[key][0].dtype
        factors = {
            source: Factors.of(adapted.targets[source], weight_dtype, parts)
            for source, parts in values.items()
            if parts
        }
        if adapted.embedding and "magnitude" in adapted.parts:
            # Ranks that receive nothing take part all the same. An embedding is one source.
            base = self._base_rows(key, dst)
            received = ((start, rows) for start, rows in base if rows is not None)
            factors = {source: found.with_column_norms(received) for source, found in factors.items()}
            for _ in base:
                pass
        return factors

    def _base_rows(self, key: str, dst: int | None) -> Iterator[tuple[int, Tensor | None]]:
        """(first row, rows) of all of a tensor without its adapter."""
        rows, step = self.table.entries[key].shape[0], self.chunk_rows(key)
        for start in range(0, rows, step):
            yield start, super().rows(key, start, min(start + step, rows), dst)
