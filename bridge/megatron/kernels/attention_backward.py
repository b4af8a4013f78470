"""The backward pass of attention as products of large tiles, for head dims at which a fused kernel has no room.

A fused kernel holds the gradients of a tile of keys in registers: at head dim 512 that leaves tiles of 32. Here weights
P and gradients of scores dS of some queries are written to a workspace, in the dtype of the tensors, and read as
operands of ordinary products. An element costs 10 bytes of memory (2 written and 2 read of P, 2 and 4 of dS) for 10 d
FLOP: at 512 that is 512 FLOP a byte, three times what keeps a Hopper GPU busy.

What a query sees is a run of columns (`Runs.first`, `Runs.stop`), within its document. Tiles that nobody sees are never
touched. P and dS are rounded once, dK and dV are summed in float32, in one order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bridge.megatron.kernels.attention_tiles import TILE, Runs, TileRange
from bridge.megatron.kernels.rounding import dot, round_to

# What products take of an operand at a time; most of D in one program.
_DEPTH = 64
_WIDTH = 256
# As many as fit in an H100's shared memory: 64 and 48 kB a stage.
_WEIGHTS_STAGES, _SUM_STAGES = 3, 4
_DELTA_ROWS = 8


# What changes from part to part is no reason to compile again.
_jit = triton.jit(
    do_not_specialize=["rows", "columns", "row_start", "column_start", "row_tiles", "column_tiles", "groups"]
)


@_jit
def attention_delta_kernel(
    output: tl.tensor,
    d_output: tl.tensor,
    delta: tl.tensor,
    rows: tl.tensor,
    output_s: tl.tensor,
    output_b: tl.tensor,
    output_h: tl.tensor,
    d_output_s: tl.tensor,
    d_output_b: tl.tensor,
    d_output_h: tl.tensor,
    D: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The sum of output times its gradient over a head, [b, heads, sq]."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here, column = row.to(tl.int64)[:, None], tl.arange(0, D)[None, :]
    mask = (row < rows)[:, None]
    x = tl.load(output + batch * output_b + head * output_h + here * output_s + column, mask, other=0.0)
    y = tl.load(d_output + batch * d_output_b + head * d_output_h + here * d_output_s + column, mask, other=0.0)
    total = tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    tl.store(delta + (batch * tl.num_programs(1) + head) * rows + row, total, row < rows)


@_jit
def attention_weights_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    d_output: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    row_document: tl.tensor,
    column_document: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    probabilities: tl.tensor,
    d_scores: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_start: tl.tensor,
    column_start: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    query_s: tl.tensor,
    query_b: tl.tensor,
    query_h: tl.tensor,
    key_s: tl.tensor,
    key_b: tl.tensor,
    key_h: tl.tensor,
    value_s: tl.tensor,
    value_b: tl.tensor,
    value_h: tl.tensor,
    d_output_s: tl.tensor,
    d_output_b: tl.tensor,
    d_output_h: tl.tensor,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """A tile of P = exp(q k^T - lse) and dS = P (dO v^T - delta) of one head; zeros where nothing is seen."""
    head = tl.program_id(0).to(tl.int64)
    batch = (tl.program_id(2) // row_tiles).to(tl.int64)
    row_tile = row_start + tl.program_id(2) % row_tiles
    column_tile = column_start + tl.program_id(1)
    tiles = tl.cdiv(rows, TILE)
    needed = column_tile >= tl.load(low + batch * tiles + row_tile)
    needed &= column_tile < tl.load(high + batch * tiles + row_tile)
    if needed:
        row = row_tile * TILE + tl.arange(0, TILE)
        column = column_tile * TILE + tl.arange(0, TILE)
        depth = tl.arange(0, DEPTH)[None, :]
        there, here = (row < rows)[:, None], (column < columns)[:, None]
        group = head // REPEAT
        first_row, first_column = row_tile.to(tl.int64) * TILE, column_tile.to(tl.int64) * TILE
        inner = tl.arange(0, TILE)[:, None]
        q_at = query + batch * query_b + head * query_h + first_row * query_s + (inner * query_s + depth)
        g_at = d_output + batch * d_output_b + head * d_output_h + first_row * d_output_s + (inner * d_output_s + depth)
        k_at = key + batch * key_b + group * key_h + first_column * key_s + (inner * key_s + depth)
        v_at = value + batch * value_b + group * value_h + first_column * value_s + (inner * value_s + depth)
        scores = tl.zeros((TILE, TILE), tl.float32)
        d_weights = tl.zeros((TILE, TILE), tl.float32)
        for start in range(0, D, DEPTH):
            q = tl.load(q_at + start, there, other=0.0)
            k = tl.load(k_at + start, here, other=0.0)
            scores = dot(q, tl.trans(k), scores)
            g = tl.load(g_at + start, there, other=0.0)
            v = tl.load(v_at + start, here, other=0.0)
            d_weights = dot(g, tl.trans(v), d_weights)
        statistic = (batch * tl.num_programs(0) + head) * rows + row
        begin = tl.load(first + batch * rows + row, row < rows, other=0)
        end = tl.load(stop + batch * rows + row, row < rows, other=0)
        mine = tl.load(row_document + batch * rows + row, row < rows, other=0)
        theirs = tl.load(column_document + batch * columns + column, column < columns, other=0)
        seen = (begin[:, None] <= column[None, :]) & (column[None, :] < end[:, None])
        seen &= mine[:, None] == theirs[None, :]
        p = tl.exp(scores - tl.load(lse + statistic, row < rows, other=0.0)[:, None])
        p = tl.where(seen, p, 0.0)
        d_s = p * (d_weights - tl.load(delta + statistic, row < rows, other=0.0)[:, None])
        # A row of the workspace has the length of all its column tiles.
        line = ((batch * tl.num_programs(0) + head) * row_tiles + row_tile - row_start) * TILE
        corner = line * (column_tiles * TILE) + tl.program_id(1) * TILE
        place = inner * (column_tiles * TILE) + tl.arange(0, TILE)[None, :]
        dtype: tl.constexpr = probabilities.dtype.element_ty
        tl.store(probabilities + corner + place, round_to(p, dtype))
        tl.store(d_scores + corner + place, round_to(d_s, dtype))


@_jit
def attention_d_query_kernel(
    d_scores: tl.tensor,
    key: tl.tensor,
    d_query: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_start: tl.tensor,
    column_start: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    key_s: tl.tensor,
    key_b: tl.tensor,
    key_h: tl.tensor,
    d_query_s: tl.tensor,
    d_query_b: tl.tensor,
    d_query_h: tl.tensor,
    REPEAT: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """WIDTH of dQ = dS k of a tile of queries of one head."""
    head = tl.program_id(1).to(tl.int64)
    batch = (tl.program_id(2) // row_tiles).to(tl.int64)
    row_tile = row_start + tl.program_id(2) % row_tiles
    tiles = tl.cdiv(rows, TILE)
    begin = tl.load(low + batch * tiles + row_tile) * TILE
    end = tl.load(high + batch * tiles + row_tile) * TILE
    row = row_tile * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    wide = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)[None, :]
    width = column_tiles.to(tl.int64) * TILE
    line = ((batch * tl.num_programs(1) + head) * row_tiles + row_tile - row_start) * TILE
    d_scores += line * width - column_start * TILE
    key += batch * key_b + (head // REPEAT) * key_h
    s_at = tl.arange(0, TILE)[:, None] * (column_tiles * TILE) + depth[None, :]
    k_at = depth[:, None] * key_s + wide
    total = tl.zeros((TILE, WIDTH), tl.float32)
    for step in range((end - begin) // DEPTH):
        column = (begin + step * DEPTH).to(tl.int64)
        d_s = tl.load(d_scores + column + s_at)
        k = tl.load(key + column * key_s + k_at, (depth < columns - column)[:, None], other=0.0)
        total = dot(d_s, k, total)
    at = d_query + batch * d_query_b + head * d_query_h + row.to(tl.int64)[:, None] * d_query_s + wide
    tl.store(at, round_to(total, d_query.dtype.element_ty), (row < rows)[:, None])


@_jit
def attention_d_key_value_kernel(
    probabilities: tl.tensor,
    d_scores: tl.tensor,
    query: tl.tensor,
    d_output: tl.tensor,
    d_key: tl.tensor,
    d_value: tl.tensor,
    row_low: tl.tensor,
    row_high: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_start: tl.tensor,
    column_start: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    groups: tl.tensor,
    query_s: tl.tensor,
    query_b: tl.tensor,
    query_h: tl.tensor,
    d_output_s: tl.tensor,
    d_output_b: tl.tensor,
    d_output_h: tl.tensor,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Adds WIDTH of dV += P^T dO or of dK += dS^T q, over all heads of a group, to float32 [b, groups, sk, D]."""
    of_value = tl.program_id(0) % 2 == 0
    wide = tl.program_id(0) // 2 * WIDTH + tl.arange(0, WIDTH)[None, :]
    column_tile = column_start + tl.program_id(1)
    group, batch = (tl.program_id(2) % groups).to(tl.int64), (tl.program_id(2) // groups).to(tl.int64)
    tile = batch * tl.cdiv(columns, TILE) + column_tile
    row_from = tl.maximum(tl.load(row_low + tile), row_start) * TILE
    row_to = tl.minimum(tl.load(row_high + tile), row_start + row_tiles) * TILE
    if row_from < row_to:
        width = column_tiles.to(tl.int64) * TILE
        left_h = width * row_tiles * TILE
        inside = (batch * groups + group) * REPEAT * left_h + tl.program_id(1) * TILE
        d_output += batch * d_output_b + group * REPEAT * d_output_h
        query += batch * query_b + group * REPEAT * query_h
        # Chosen by value, not by branches: those would have a pipeline, and its shared memory, each.
        left = tl.where(of_value, probabilities, d_scores) + inside
        right = tl.where(of_value, d_output, query)
        right_s = tl.where(of_value, d_output_s, query_s)
        right_h = tl.where(of_value, d_output_h, query_h)
        out = tl.where(of_value, d_value, d_key)
        depth = tl.arange(0, DEPTH)
        steps = (row_to - row_from) // DEPTH
        total = tl.zeros((TILE, WIDTH), tl.float32)
        # Of a tile, in 32 bits: where it lies is a number of the program, in 64.
        left_at = depth[:, None] * (column_tiles * TILE) + tl.arange(0, TILE)[None, :]
        right_at = depth[:, None] * right_s + wide
        # One loop over heads and rows, so that loads run ahead from head to head.
        for step in range(REPEAT * steps):
            head = (step // steps).to(tl.int64)
            row = (row_from + step % steps * DEPTH).to(tl.int64)
            a = tl.load(left + head * left_h + (row - row_start * TILE) * width + left_at)
            b = tl.load(right + head * right_h + row * right_s + right_at, (depth < rows - row)[:, None], other=0.0)
            total = dot(tl.trans(a), b, total)
        inner, begin = tl.arange(0, TILE)[:, None], column_tile * TILE
        at = out + ((batch * groups + group) * columns + begin) * D + (inner * D + wide)
        mask = inner < columns - begin
        tl.atomic_add(at, total, mask, sem="relaxed")


def launches(d: int, repeat: int) -> dict[str, dict[str, Any]]:
    """Constants and options of the kernels for heads of `d`, `repeat` of them for each of keys and values."""
    weights = {"REPEAT": repeat, "TILE": TILE, "DEPTH": min(d, _DEPTH), "num_warps": 8}
    sums = weights | {"WIDTH": min(d, _WIDTH), "num_stages": _SUM_STAGES}
    return {
        "attention_delta_kernel": {"D": d, "ROWS": _DELTA_ROWS, "num_warps": 4},
        "attention_weights_kernel": weights | {"D": d, "num_stages": _WEIGHTS_STAGES},
        "attention_d_query_kernel": sums,
        "attention_d_key_value_kernel": sums | {"D": d},
    }


def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    d_output: Tensor,
    runs: Runs,
    parts: Sequence[TileRange],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [sq, b, heads, D], key and value [sk, b, groups, D] of softmax(q k^T) v; D a power of 2 >= 16.

    `output` and `d_output` are as `query`, `lse` [b, heads, sq] float32. `parts` cover all tiles of queries.
    """
    query, key, value, output, d_output = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value, output, d_output)
    )
    (rows, batch, heads, d), (columns, _, groups, _) = query.shape, key.shape
    d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    sums = torch.zeros(2, batch, groups, columns, d, dtype=torch.float32, device=query.device)
    size = max(part.tiles for part in parts) * batch * heads * TILE * TILE
    weights, d_scores = torch.empty(2, size, dtype=query.dtype, device=query.device)
    lse, delta = lse.contiguous(), torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    pieces, options = triton.cdiv(d, _WIDTH), launches(d, heads // groups)
    q_at, k_at, v_at, g_at, dq_at = (x.stride()[:3] for x in (query, key, value, d_output, d_query))
    with torch.cuda.device_of(query):
        attention_delta_kernel[(triton.cdiv(rows, _DELTA_ROWS), heads, batch)](
            output, d_output, delta, rows, *output.stride()[:3], *g_at, **options["attention_delta_kernel"]
        )
        for part in parts:
            tall, wide = part.row_stop - part.row_start, part.column_stop - part.column_start
            place = (rows, columns, part.row_start, part.column_start, tall, wide)
            attention_weights_kernel[(heads, wide, tall * batch)](
                *(query, key, value, d_output, lse, delta, *runs[:6], weights, d_scores, *place),
                *(*q_at, *k_at, *v_at, *g_at),
                **options["attention_weights_kernel"],
            )
            attention_d_query_kernel[(pieces, heads, tall * batch)](
                *(d_scores, key, d_query, runs.low, runs.high, *place, *k_at, *dq_at),
                **options["attention_d_query_kernel"],
            )
            attention_d_key_value_kernel[(2 * pieces, wide, groups * batch)](
                *(weights, d_scores, query, d_output, *sums, runs.row_low, runs.row_high, *place, groups, *q_at, *g_at),
                **options["attention_d_key_value_kernel"],
            )
    # sums: of the keys, of the values.
    d_key, d_value = sums.to(key.dtype).permute(0, 3, 1, 2, 4)
    return d_query, d_key, d_value
