"""Caches by layer kind: what a ring holds, how caches grow, and their formula."""

from __future__ import annotations

import pytest
import torch

from bridge.generate.memory import cache_bytes
from bridge.geometry import Geometry
from bridge.megatron.kv_cache import KeyValueCaches, LayerCache
from bridge.toy import VARIANTS
from bridge.toy.config import published


def tokens(start: int, stop: int) -> torch.Tensor:
    """[n, 2 groups, 3], which say their position."""
    return torch.arange(start, stop, dtype=torch.float32)[:, None, None].expand(-1, 2, 3).clone()


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("parts", [(3, 5, 8, 9, 30), (30,), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)])
def test_what_was_written_is_read(window: int | None, parts: tuple[int, ...]) -> None:
    empty = torch.zeros(0, 2, 0, 3)
    cache, start = LayerCache(window, empty, empty.clone()), 0
    for stop in parts:
        cache.reserve(2, stop)
        cache.write(1, start, tokens(start, stop), -tokens(start, stop))
        first = 0 if window is None else max(0, stop - window)
        key, value = cache.read(1, first, stop)
        assert torch.equal(key, tokens(first, stop)) and torch.equal(value, -tokens(first, stop))
        start = stop
    if window is not None:
        assert cache.key.shape[2] <= window, "a ring does not grow"


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formula(variant: str, tp_size: int) -> None:
    """Of every layer, and of a stage in whose layers most read those of an earlier one."""
    geometry = Geometry.from_dict(published(variant))
    for layers in (range(geometry.num_layers), range(geometry.num_layers - 4, geometry.num_layers)):
        caches = KeyValueCaches(geometry)
        for source in {geometry.layers[i].kv_source for i in layers}:
            layer = geometry.layers[source]
            groups = max(1, layer.num_query_groups // tp_size)
            key = torch.zeros(1, 1, groups, layer.head_dim, dtype=torch.bfloat16, device="meta")
            caches.of(source, key).reserve(3, 5000)
        assert caches.nbytes == cache_bytes(geometry, layers, 3, 5000, 2, tp_size)
