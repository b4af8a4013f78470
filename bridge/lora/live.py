"""The weights of a live model with its adapters in them: what an inference engine takes, and `save_hf` writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, get_args

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from bridge.convert.live import CHUNK_BYTES, Gatherer, Ranks
from bridge.convert.live_save import Origin
from bridge.convert.torch_dtypes import DTYPE_NAMES
from bridge.errors import UsageError
from bridge.hf.tensors import num_rows
from bridge.lora.adapter import Adapter, adapter_assets
from bridge.lora.formats import check_servable, stored_tensors
from bridge.lora.merge import Factors
from bridge.lora.spec import Factor, LoraSpec, Target
from bridge.lora.table import Adapted, AdapterTable, canonical, part_name
from bridge.mapping import Table

Adapters = Literal["merge", "leave"]


def open_gatherer(
    model: Sequence[torch.nn.Module], table: Table, adapters: str, chunk_bytes: int = CHUNK_BYTES
) -> Gatherer:
    """What gathers the weights of a live model; "merge" or "leave" its adapters, if it has any. Collective.

    The weights are those of the last update: under `overlap_param_gather` they are waited for.
    Raises UsageError for another word, and what any rank raises.
    """
    if adapters not in get_args(Adapters):
        raise UsageError(f"adapters={adapters!r}: known are {', '.join(get_args(Adapters))}")
    wait_for_parameters(model)
    held = [chunk.adapter_table for chunk in map(unwrap_model, model)]
    if not held or held[0] is None or adapters == "leave":
        return Gatherer(model, table, chunk_bytes=chunk_bytes)
    return MergedGatherer(model, table, held[0], chunk_bytes)


def wait_for_parameters(model: Sequence[torch.nn.Module]) -> None:
    """Wait for what other ranks have updated, under `overlap_param_gather`. Collective."""
    for wait in _parameter_syncs(model):
        wait(force_sync=True)


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

    def __init__(
        self,
        model: Sequence[torch.nn.Module],
        table: Table,
        adapters: AdapterTable,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        super().__init__(model, table, chunk_bytes=chunk_bytes)
        # What is trained whole is in the model itself.
        self._factors_table = adapters.factors()
        self._factors = Gatherer(model, self._factors_table, chunk_bytes=chunk_bytes)
        self._last: tuple[str, dict[int, Factors]] = "", {}
        for target in self._factors_table.targets:
            if target.kind == "embedding" and table.copies_of(target.name) and self._rank == 0:
                # PEFT warns of it and does the same.
                warnings.warn(
                    f"{target.module} is tied to the head, which gets its adapter too: in training it had none",
                    stacklevel=2,
                )

    def rows(
        self, key: str, start: int, stop: int, ranks: Ranks = None, device: torch.device | str = "cpu"
    ) -> Tensor | None:
        """See `Gatherer.rows`."""
        rows = super().rows(key, start, stop, ranks, device)
        adapted = self._factors_table.adapted.get(key)
        if adapted is None:
            return rows
        if self._last[0] != key:
            self._last = key, {}  # before others are made
            self._last = key, self._read(key, adapted, ranks, device)
        if rows is not None:
            for block in adapted.weight.blocks:
                low, high = max(start, block.row), min(stop, block.row + block.num_rows)
                if low < high and block.source in self._last[1]:
                    part = rows[low - start : high - start]
                    part.copy_(self._last[1][block.source].merged(part, block.source_row + low - block.row))
        return rows

    def _read(self, key: str, adapted: Adapted, ranks: Ranks, device: torch.device | str) -> dict[int, Factors]:
        """The factors of each adapted source of a Megatron tensor, on the ranks that receive. Collective."""
        values: dict[int, list[Tensor]] = {source: [] for source in adapted.order}
        for part in adapted.parts:
            names = {source: part_name(adapted.targets[source].name, part) for source in adapted.order}
            entry, _ = self._factors_table.by_hf_name[names[adapted.order[0]]]
            whole = self._factors.rows(entry.key, 0, entry.shape[0], ranks, device)
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
            base = self._base_rows(key, ranks, device)
            received = ((start, rows) for start, rows in base if rows is not None)
            factors = {source: found.with_column_norms(received) for source, found in factors.items()}
            for _ in base:
                pass
        return factors

    def _base_rows(self, key: str, ranks: Ranks, device: torch.device | str) -> Iterator[tuple[int, Tensor | None]]:
        """(first row, rows) of all of a tensor without its adapter."""
        rows, step = self.table.entries[key].shape[0], self.chunk_rows(key)
        for start in range(0, rows, step):
            yield start, super().rows(key, start, min(start + step, rows), ranks, device)


class AdapterGatherer:
    """The factors of a live model's adapters, whole and as PEFT has them. Collective, as `Gatherer` is.

    Raises UsageError for a model without adapters, or one that `adapter_format` cannot hold.
    """

    def __init__(
        self, model: Sequence[torch.nn.Module], adapter_format: str = "peft", chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        held = unwrap_model(model[0]).adapter_table
        if held is None:
            raise UsageError("this model has no adapters")
        self.table: AdapterTable = held
        check_servable(adapter_format, list(held.targets))
        wait_for_parameters(model)
        self._gatherer = Gatherer(model, held, chunk_bytes=chunk_bytes)

    def key(self, target: Target, part: Factor) -> str:
        """Of the Megatron tensor that a factor is a part of."""
        return self.table.by_hf_name[part_name(target.name, part)][0].key

    def dtype(self, target: Target, part: Factor) -> torch.dtype:
        """Of a factor."""
        return self._gatherer.dtype(self.key(target, part))

    def factor(
        self, target: Target, part: Factor, ranks: Ranks = None, device: torch.device | str = "cpu"
    ) -> Tensor | None:
        """A factor of the shape `target.shape_of(part)` on `device`; None on ranks that receive nothing."""
        entry, number = self.table.by_hf_name[part_name(target.name, part)]
        whole = self._gatherer.rows(entry.key, 0, num_rows(entry.shape), ranks, device)
        return None if whole is None else canonical(entry, number, whole, target, part)


def iter_adapters(
    model: Sequence[torch.nn.Module], table: Table, adapter_format: str, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on `device`) of a live model's adapters in a format, on every rank. Collective."""
    gatherer = AdapterGatherer(model, adapter_format)
    stored = stored_tensors(adapter_format, list(gatherer.table.targets), table)
    for (target, part), pieces in groupby(stored, lambda piece: (piece.target, piece.part)):
        factor = gatherer.factor(target, part, device=device)
        assert factor is not None
        for piece in pieces:
            yield piece.key, piece.view(factor).reshape(piece.shape).contiguous()


def read_adapter(model: Sequence[torch.nn.Module], origin: Origin, spec: LoraSpec) -> Adapter | None:
    """A live model's adapters as an open `Adapter`, on rank 0; None elsewhere. Collective. Factors are held on the CPU.

    `spec`: what they are of. `origin`: the bridge that the model is of.
    """
    gatherer = AdapterGatherer(model)
    targets = tuple(gatherer.table.targets)
    factors: dict[tuple[str, Factor], Tensor] = {}
    for target in targets:
        for part in target.parts:
            factor = gatherer.factor(target, part, ranks=(0,))
            if factor is not None:
                factors[target.name, part] = factor
    if not factors:
        return None
    hf = origin.hf_dir if origin.megatron is None else origin.megatron.hf
    assert hf is not None
    return Adapter(
        hf,
        origin.table,
        spec,
        targets,
        lambda target, part: factors[target.name, part],
        lambda target, part: DTYPE_NAMES[gatherer.dtype(target, part)],
        (),
        str(hf if origin.megatron is None else origin.megatron.path),
        assets_folder=hf,
        assets=adapter_assets(path.relative_to(hf) for path in hf.iterdir() if path.is_file()),
    )
