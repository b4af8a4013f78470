"""The tables, row by row, for one model."""

from __future__ import annotations

from collections.abc import Iterator

from bridge.geometry import Geometry, LayerGeometry
from bridge.mapping.drafter import DRAFTER
from bridge.mapping.modalities import MODALITIES
from bridge.mapping.moe import MOE
from bridge.mapping.ple import PLE
from bridge.mapping.table import Entry, HfTensor, Row, Table
from bridge.mapping.text import TEXT
from bridge.mapping.unified import UNIFIED


def dimensions(geometry: Geometry, layer: LayerGeometry | None) -> dict[str, int]:
    """The sizes that rows speak of."""
    sizes = {"1": 1, "hidden": geometry.hidden_size, "vocab": geometry.vocab_size}
    if geometry.ple is not None:
        sizes["ple"] = geometry.ple.dim
        sizes["ple_vocab"] = geometry.ple.vocab_size
        sizes["layers*ple"] = geometry.num_layers * geometry.ple.dim
    if geometry.moe is not None:
        sizes["experts"] = geometry.moe.num_experts
        sizes["moe_ffn"] = geometry.moe.ffn_hidden_size
        sizes["2*moe_ffn"] = 2 * geometry.moe.ffn_hidden_size
    if geometry.drafter is not None:
        sizes |= {"backbone": geometry.drafter.backbone_hidden_size, "centroids": geometry.drafter.num_centroids or 0}
        sizes["2*backbone"] = 2 * geometry.drafter.backbone_hidden_size
    if layer is not None:
        sizes |= {"head_dim": layer.head_dim, "q": layer.q_size, "kv": layer.kv_size, "ffn": layer.ffn_hidden_size}
    sizes |= {"2": 2, "3": 3}
    for modality in MODALITIES.values():
        sizes |= modality.dimensions(geometry)
    return sizes


def all_rows() -> tuple[Row, ...]:
    """Every row of every table, in the order of the documentation."""
    return (*TEXT, *PLE, *MOE, *(row for each in MODALITIES.values() for row in each.rows), *UNIFIED, *DRAFTER)


def table_for(geometry: Geometry) -> Table:
    """Expand the tables for one model."""
    entries: dict[str, Entry] = {}
    carried: dict[str, HfTensor] = {}
    copies: dict[str, Entry] = {}
    for row in all_rows():
        for number, layer in enumerate(row.stack.layers(geometry) if row.per_layer else (None,)):
            if not row.when.holds(geometry, layer):
                continue
            sources = tuple(_sources(row, geometry, layer, number))
            if row.megatron is None:
                carried.update((source.name, source) for source in sources)
                continue
            key = _name(row.megatron, number)
            if row.optional:
                copies.update((source.name, entries[key]) for source in sources)
                continue
            shape, blocks = row.transform([source.shape for source in sources], layer)
            entries[key] = Entry(key, shape, sources, blocks, row, layer)
    return Table(geometry, entries, carried, copies)


def _sources(row: Row, geometry: Geometry, layer: LayerGeometry | None, number: int) -> Iterator[HfTensor]:
    sizes = dimensions(geometry, layer)
    for pattern, shape in zip(row.hf, row.shapes, strict=True):
        name = geometry.prefix + pattern
        if pattern.startswith("/model."):
            name = geometry.base + pattern.removeprefix("/model.")
        elif pattern.startswith("/"):
            name = pattern[1:]
        yield HfTensor(_name(name, number), tuple(sizes[size] for size in shape))


def _name(pattern: str, number: int) -> str:
    return pattern.replace("{layer}", str(number))
