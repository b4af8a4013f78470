"""What generation holds, from the geometry alone: for those who do not import torch."""

from __future__ import annotations

from collections.abc import Iterable

from bridge.geometry import Geometry

# Rows that are answered at once on a replica, where nobody says another number.
MAX_ROWS = 16


def cache_bytes(
    geometry: Geometry, layers: Iterable[int], rows: int, positions: int, itemsize: int, tp_size: int = 1
) -> int:
    """What `rows` of `positions` tokens take on a rank that holds `layers`: mirrors of earlier stages included."""
    sources = {geometry.layers[i].kv_source for i in layers}
    total = 0
    for layer in (geometry.layers[i] for i in sources):
        columns = positions if layer.window is None else min(layer.window, positions)
        total += 2 * max(1, layer.num_query_groups // tp_size) * layer.head_dim * columns
    return total * rows * itemsize
