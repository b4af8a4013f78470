"""What travels between pipeline stages.

Megatron's schedules send one tensor [s, b, hidden] per boundary. Gemma 4 sometimes needs more to travel: the input
embeddings (every later stage projects its own per-layer inputs from them), and the keys and values that layers on a
later stage read. They go as further slots stacked on the sequence axis: the payload is [slots * s, b, hidden], the
same number of slots at every boundary, so that the stock 1F1B and interleaved schedules carry it when they are called
with `seq_length * slots`. Models without per-layer embeddings and shared K/V have one slot: nothing changes for them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.megatron.attention import KeyValue, local_query_groups


@dataclass(frozen=True)
class TravellingKv:
    """Keys and values of layer `source`, as one rank holds them."""

    source: int
    groups: int
    head_dim: int


@dataclass(frozen=True)
class Boundary:
    """What crosses to layer `first_layer` from the layers before it, on one rank.

    `factor` is by how much keys, which span the whole sequence on every rank, are longer than the hidden states of a
    rank: the tensor-parallel size under sequence parallelism, else 1.
    """

    hidden_size: int
    embeds: bool
    kv: tuple[TravellingKv, ...]
    factor: int

    @classmethod
    def before(
        cls,
        geometry: Geometry,
        first_layer: int,
        tp_size: int,
        sequence_parallel: bool,
        published_kv: tuple[int, ...] = (),
    ) -> Boundary:
        """K/V travel only where a producer lies before the boundary and a reader behind it.

        What another model reads (`published_kv`) is read on the last stage.
        """
        behind = geometry.layers[first_layer:]
        sources = {layer.kv_source for layer in behind if not layer.external_kv and layer.kv_source < first_layer}
        if behind:
            sources |= {source for source in published_kv if source < first_layer}
        kv = tuple(
            TravellingKv(source, local_query_groups(geometry.layers[source], tp_size), geometry.layers[source].head_dim)
            for source in sorted(sources)
        )
        return cls(geometry.hidden_size, geometry.ple is not None, kv, tp_size if sequence_parallel else 1)

    @property
    def slots(self) -> int:
        """How many tensors of the hidden states' shape hold what crosses here."""
        width = sum(2 * kv.groups * kv.head_dim * self.factor for kv in self.kv)
        return 1 + self.embeds + -(-width // self.hidden_size)

    def pack(self, hidden_states: Tensor, embeds: Tensor | None, kv: dict[int, KeyValue], slots: int) -> Tensor:
        """Hidden states [s', b, h] and what else crosses -> [slots * s', b, h], a fresh tensor: Megatron frees it."""
        rows, batch, hidden = hidden_states.shape
        parts = [hidden_states] if embeds is None or not self.embeds else [hidden_states, embeds]
        spare = (slots - len(parts)) * hidden
        if spare:
            flat = [_fold(tensor, self.factor) for entry in self.kv for tensor in kv[entry.source]]
            flat.append(hidden_states.new_zeros(rows, batch, spare - sum(tensor.shape[-1] for tensor in flat)))
            extra = torch.cat(flat, dim=-1).unflatten(-1, (-1, hidden))
            parts.append(extra.permute(2, 0, 1, 3).flatten(0, 1))
        return torch.cat(parts) if len(parts) > 1 else hidden_states

    def unpack(self, payload: Tensor, slots: int) -> tuple[Tensor, Tensor | None, dict[int, KeyValue]]:
        """The inverse of `pack`: hidden states, input embeddings, K/V by producing layer."""
        hidden_states, *rest = payload.chunk(slots)
        embeds = rest.pop(0) if self.embeds else None
        if not self.kv:
            return hidden_states, embeds, {}
        flat, offset, kv = torch.cat(rest, dim=-1), 0, {}
        for entry in self.kv:
            width = entry.groups * entry.head_dim * self.factor
            pair = flat[..., offset : offset + 2 * width].split(width, dim=-1)
            kv[entry.source] = KeyValue(*(_unfold(t, self.factor, entry.groups, entry.head_dim) for t in pair))
            offset += 2 * width
        return hidden_states, embeds, kv


def _fold(x: Tensor, factor: int) -> Tensor:
    """[s, b, g, d] -> [s / factor, b, factor * g * d]."""
    return x.flatten(2).unflatten(0, (-1, factor)).transpose(1, 2).flatten(2)


def _unfold(x: Tensor, factor: int, groups: int, head_dim: int) -> Tensor:
    """The inverse of `_fold`."""
    x = x.unflatten(-1, (factor, groups, head_dim)).transpose(1, 2)
    return x.flatten(0, 1).contiguous()
