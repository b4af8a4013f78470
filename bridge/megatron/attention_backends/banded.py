"""torch's scaled_dot_product_attention on bands of keys: rows in which no query sees far.

Queries go in tiles of one length. Each has the keys of its own place, some before and some behind it, as many as the
query that sees furthest needs; the tiles are the batch of one product. So work and memory are linear in the row, and
there is one call, not one for each tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from bridge.megatron.attention_backends import blockwise, dense
from bridge.megatron.mask import Mask

# Queries of a tile are a multiple of this.
TILE = 32


class _Size(NamedTuple):
    """Of a tile of `tile` queries, that see `before` keys before their place and `behind` behind it."""

    tile: int
    before: int
    behind: int


class _Band(NamedTuple):
    """`bias` [tiles * b, 1, tile, before + tile + behind] float32: 0 where a key is seen, else -inf."""

    size: _Size
    bias: Tensor


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """[s, b, heads, d], and [s, b, groups, d] twice -> [s, b, heads, d]."""
    length, batch, heads, _ = query.shape
    band = _band_of(mask)
    keys, values = (_with_neighbours(_tiles(x, band.size.tile), band.size) for x in (key, value))
    output = scaled_dot_product_attention(
        _tiles(query, band.size.tile).flatten(0, 1),
        keys,
        values,
        attn_mask=band.bias.to(query.dtype),
        scale=1.0,
        enable_gqa=True,
    )
    tiles = output.unflatten(0, (-1, batch)).permute(0, 3, 1, 2, 4)
    whole = tiles.reshape(-1, batch, heads, query.shape[3])
    return whole if len(whole) == length else whole[:length]


def refuse(query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """Whole rows on a CPU, of which tiles one by one (`blockwise`) would compute more."""
    if query.is_cuda:
        return "it is for a CPU"
    if len(mask.rows) > 1 or mask.rows != mask.columns:
        return "queries are a part of the row"
    length, keys = len(mask.row_places), sum(_size(mask))
    if length * keys > blockwise.computed(mask, query.shape[2] // key.shape[2]):
        return "some query sees so far that tiles one by one have less to compute"
    # To cut bands and to put them together takes a part of the time of a short row.
    if length <= dense.SHORT and 2 * keys > length:
        return "the row is so short that one product is faster"
    return None


def _size(mask: Mask) -> _Size:
    """Of tiles that see no further than the next one."""
    (first, stop), place = mask.reach, mask.row_places
    before, behind = int((place - first).amax()), int((stop - 1 - place).amax())
    return _Size(max(1, -(-max(before, behind) // TILE)) * TILE, before, behind)


def _band_of(mask: Mask) -> _Band:
    """Of a mask, made once."""
    if "band" not in mask.cache:
        mask.cache["band"] = _make_band(mask)
    band = mask.cache["band"]
    assert isinstance(band, _Band)
    return band


def _make_band(mask: Mask) -> _Band:
    (first, stop), (tile, before, behind) = mask.reach, _size(mask)
    length = first.shape[1]
    fill = -length % tile
    # Of queries that are not there each sees one key, for a softmax that is a number.
    place = torch.arange(length + fill, device=first.device).view(1, -1, tile, 1)
    column = place[:, :, :1] - before + torch.arange(before + tile + behind, device=first.device)
    first, stop = (
        torch.cat([x, place.view(1, -1)[:, length:].expand(len(x), -1) + last], 1)
        for last, x in enumerate((first, stop))
    )
    document = pad(mask.row_document, (0, fill), value=-2)
    of_column = document[:, column.clamp(0, length + fill - 1).flatten()].view(len(document), -1, 1, column.shape[3])
    seen = (first.view(-1, place.shape[1], tile, 1) <= column) & (column < stop.view(-1, place.shape[1], tile, 1))
    seen &= document.view(-1, place.shape[1], tile, 1) == of_column
    bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
    return _Band(_size(mask), bias.transpose(0, 1).flatten(0, 1)[:, None])


def _tiles(x: Tensor, tile: int) -> Tensor:
    """[s, b, heads, d] -> [tiles, b, heads, tile, d]."""
    if fill := -x.shape[0] % tile:
        x = pad(x, (0, 0, 0, 0, 0, 0, 0, fill))
    return x.unflatten(0, (-1, tile)).permute(0, 2, 3, 1, 4)


def _with_neighbours(tiles: Tensor, size: _Size) -> Tensor:
    """[tiles, b, groups, tile, d] -> [tiles * b, groups, before + tile + behind, d]; nothing sees what is no key."""
    # To pad by less than nothing is to cut, and one operation as its gradient is too; of slices it would be two.
    before = pad(tiles, (0, 0, size.before - size.tile, 0, 0, 0, 0, 0, 1, -1))
    behind = pad(tiles, (0, 0, 0, size.behind - size.tile, 0, 0, 0, 0, -1, 1))
    return torch.cat([before, tiles, behind], 3).flatten(0, 1)
