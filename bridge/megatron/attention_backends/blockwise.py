"""Block-sparse flash attention in plain torch: any mask, any head dim, linear memory, on CPU and GPU.

Queries go in tiles; of the keys only those are touched that some query of the tile sees (`Mask.tiles`), and only the
rims of that run are masked elementwise. The softmax is accumulated online in float32. The backward pass makes the
weights again from the saved log-sum-exp, tile by tile. Query heads of one group are rows of one product: keys and
values are never repeated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bridge.megatron.mask import Mask, Tile

# Rows of queries (over all heads of a group) and keys in one product, by device: small enough for a CPU's cache, large
# enough for a GPU to be busy with one.
TILE = {"cpu": (512, 512), "cuda": (4096, 4096)}
# Below every score, above -inf: rows that have seen nothing yet stay finite.
_LOWEST = -1e30


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """[sq, b, heads, d], and [sk, b, groups, d] twice -> [sq, b, heads, d] in the dtype of `query`."""
    output: Tensor = _Blockwise.apply(query, key, value, mask)
    return output


def refuse(query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """It honours everything."""
    return None


def computed(mask: Mask, repeat: int) -> int:
    """Pairs of queries and keys of a row and head that it computes on a CPU, with so many heads to a group."""
    tiles = mask.tiles(max(1, TILE["cpu"][0] // repeat))
    return sum((tile.stop - tile.start) * (tile.key_stop - tile.key_start) for tile in tiles)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
        q, k, v = _Operands.of(query, key, value)
        tiling = _Tiling(mask, q)
        output = torch.empty(q.shape, dtype=query.dtype, device=q.device)
        lse = torch.empty(*q.shape[:3], 1, dtype=torch.float32, device=q.device)
        for tile, pieces in tiling:
            rows = slice(tile.start, tile.stop)
            q_tile = q[:, rows].flatten(1, 2)
            highest = torch.full((*q_tile.shape[:2], 1), _LOWEST, dtype=torch.float32, device=q.device)
            total = torch.zeros_like(highest)
            context = torch.zeros(q_tile.shape, dtype=torch.float32, device=q.device)
            for start, stop, masked in pieces:
                scores = tiling.scores(q_tile, k, tile, start, stop, masked)
                new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
                weights = scores.sub_(new_highest).exp_()
                shrink = (highest - new_highest).exp_()
                total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
                context.mul_(shrink)
                _add_product(context, weights.to(v.dtype), v[:, start:stop])
                highest = new_highest
            output[:, rows] = (context / total).unflatten(1, (-1, q.shape[2])).to(output.dtype)
            lse[:, rows] = (highest + total.log()).unflatten(1, (-1, q.shape[2]))
        ctx.mask = mask
        ctx.save_for_backward(query, key, value, output, lse)
        return _Operands.back(output, query.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, output, lse = ctx.saved_tensors
        q, k, v = _Operands.of(query, key, value)
        d_output = _Operands.queries(grad, key.shape[2])
        # What the softmax's own derivative subtracts from every score's gradient.
        delta = (d_output.float() * output.float()).sum(-1, keepdim=True)
        d_query = torch.empty(q.shape, dtype=query.dtype, device=q.device)
        d_key, d_value = (torch.zeros(k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
        tiling = _Tiling(ctx.mask, q)
        for tile, pieces in tiling:
            rows = slice(tile.start, tile.stop)
            q_tile, d_tile = q[:, rows].flatten(1, 2), d_output[:, rows].flatten(1, 2)
            lse_tile, delta_tile = lse[:, rows].flatten(1, 2), delta[:, rows].flatten(1, 2)
            dq_tile = torch.zeros(q_tile.shape, dtype=torch.float32, device=q.device)
            for start, stop, masked in pieces:
                weights = tiling.scores(q_tile, k, tile, start, stop, masked).sub_(lse_tile).exp_()
                _add_product(d_value[:, start:stop], weights.to(v.dtype).transpose(1, 2), d_tile)
                d_weights = _product(d_tile, v[:, start:stop].transpose(1, 2))
                d_scores = d_weights.sub_(delta_tile).mul_(weights).to(q.dtype)
                _add_product(dq_tile, d_scores, k[:, start:stop])
                _add_product(d_key[:, start:stop], d_scores.transpose(1, 2), q_tile)
            d_query[:, rows] = dq_tile.unflatten(1, (-1, q.shape[2])).to(d_query.dtype)
        d_key, d_value = (x.to(key.dtype).unflatten(0, key.shape[1:3]).permute(2, 0, 1, 3) for x in (d_key, d_value))
        return _Operands.back(d_query, query.shape), d_key, d_value, None


class _Operands:
    """Layouts: queries [b * groups, s, heads of a group, d], keys and values [b * groups, s, d].

    A CPU has no product of bf16 operands with a float32 result, so there they are widened; a GPU has.
    """

    @staticmethod
    def of(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (x.permute(1, 2, 0, 3).flatten(0, 1) for x in (key, value))
        return _Operands.queries(query, key.shape[2]), _wide(k), _wide(v)

    @staticmethod
    def queries(x: Tensor, groups: int) -> Tensor:
        return _wide(x.unflatten(2, (groups, -1)).permute(1, 2, 0, 3, 4).flatten(0, 1))

    @staticmethod
    def back(x: Tensor, shape: torch.Size) -> Tensor:
        """[b * groups, s, heads of a group, d] -> `shape` [s, b, heads, d]."""
        return x.unflatten(0, (shape[1], -1)).permute(2, 0, 1, 3, 4).reshape(shape)


class _Tiling:
    """The tiles of one call, and the masked scores of a piece of one."""

    def __init__(self, mask: Mask, q: Tensor) -> None:
        self.mask, self.repeat = mask, q.shape[2]
        rows, self.piece = TILE.get(q.device.type, TILE["cpu"])
        self.rows = max(1, rows // self.repeat)

    def __iter__(self) -> Any:
        for tile in self.mask.tiles(self.rows):
            yield tile, tile.pieces(self.piece)

    def scores(self, q_tile: Tensor, k: Tensor, tile: Tile, start: int, stop: int, masked: bool) -> Tensor:
        """[b * groups, queries * repeat, keys] float32, a fresh tensor; -inf where a key is not seen."""
        scores = _product(q_tile, k[:, start:stop].transpose(1, 2))
        if masked:
            hidden = ~self.mask.between(slice(tile.start, tile.stop), slice(start, stop))
            view = scores.view(hidden.shape[0], -1, hidden.shape[1], self.repeat, hidden.shape[2])
            view.masked_fill_(hidden[:, None, :, None], -torch.inf)
        return scores


def _wide(x: Tensor) -> Tensor:
    return x.contiguous() if x.is_cuda else x.float().contiguous()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """[n, i, k] @ [n, k, j] in float32, whatever the operands are."""
    return torch.bmm(a, b) if a.dtype is torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if a.dtype is torch.float32:
        total.baddbmm_(a, b)
    else:
        total.add_(_product(a, b))
