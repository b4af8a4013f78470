"""The two passes over a chunk of logits that the loss makes (the definition is `bridge.megatron.loss`).

The first reads them for each row's maximum, sum of exponentials and label's logit; the second turns them into the
gradient of the losses where they lie. Between the two the statistics are summed over the ranks that share the
vocabulary. The softcap is part of both; what it gives is rounded to the dtype of the logits after each operation, as in
torch, and all that follows is float32. Nothing of the size of the logits is made beside them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bridge.megatron.kernels.rounding import round_to

# Words of a row that one program of the first pass reads; more programs than rows keep a large device busy.
_PART = 16384
_BLOCK = 4096


@triton.jit
def _tanh_logits(logits: tl.tensor, cap: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """tanh(logits / cap) of float32 values, rounded to `dtype` as two operations."""
    x = round_to(logits / cap, dtype).to(tl.float32)
    # (1 - e) / (1 + e) with e = exp(-2 |x|) cancels where x is small; its series is exact there.
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    square = x * x
    near = tl.abs(x) * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    tanh = tl.where(tl.abs(x) < 0.25, near, far)
    return round_to(tl.where(x < 0, -tanh, tanh), dtype).to(tl.float32)


@triton.jit
def cross_entropy_statistics_kernel(
    logits: tl.tensor,
    column: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    target: tl.tensor,
    words: tl.tensor,
    cap: tl.tensor,
    SOFTCAP: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """PART of the words of a row: maximum, sum of exp(logit - maximum), and the logit at `column` or 0."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    dtype: tl.constexpr = logits.dtype.element_ty
    wanted = tl.load(column + row)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PART, BLOCK):
        word = part * PART + start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * words + word, word < words, other=-float("inf")).to(tl.float32)
        if SOFTCAP:
            capped = round_to(_tanh_logits(x, cap, dtype) * cap, dtype).to(tl.float32)
            x = tl.where(word < words, capped, -float("inf"))
        found += tl.where(word == wanted, x, 0.0)
        # Of each lane on its own: nothing is reduced before the end. A lane that has seen no word has no sum.
        new = tl.maximum(highest, x)
        base = tl.where(new == -float("inf"), 0.0, new)
        summed = summed * tl.exp(highest - base) + tl.exp(x - base)
        highest = new
    best = tl.max(highest, 0)
    place = row * tl.num_programs(1) + part
    tl.store(top + place, best)
    tl.store(total + place, tl.sum(summed * tl.exp(highest - best), 0))
    tl.store(target + place, tl.sum(found, 0))


@triton.jit
def cross_entropy_gradient_kernel(
    logits: tl.tensor,
    column: tl.tensor,
    lse: tl.tensor,
    weights: tl.tensor,
    words: tl.tensor,
    cap: tl.tensor,
    z_loss: tl.tensor,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """BLOCK words of a row of logits -> their gradients, in place; `weights` of the rows may be None."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = word < words
    dtype: tl.constexpr = logits.dtype.element_ty
    z = tl.load(lse + row)
    x = tl.load(logits + row * words + word, mask, other=0.0).to(tl.float32)
    tanh_logits = x
    if SOFTCAP:
        tanh_logits = _tanh_logits(x, cap, dtype)
        x = round_to(tanh_logits * cap, dtype).to(tl.float32)
    gradient = tl.exp(x - z) * (1 + 2 * z_loss * z)
    gradient -= tl.where(word == tl.load(column + row), 1.0, 0.0)
    if weights is not None:
        gradient *= tl.load(weights + row)
    if SOFTCAP:
        gradient *= 1 - tanh_logits * tanh_logits
    tl.store(logits + row * words + word, round_to(gradient, dtype), mask)


def statistics(logits: Tensor, column: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of raw logits [n, V]: maximum, sum of exp(logit - maximum), and the logit at `column` [n], float32 [n] each.

    `softcap` is applied. A column of -1 is none: its logit is 0.
    """
    rows, words = logits.shape
    parts = triton.cdiv(words, _PART)
    top, total, target = torch.empty(3, rows, parts, dtype=torch.float32, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            cross_entropy_statistics_kernel[(rows, parts)](
                logits,
                column,
                top,
                total,
                target,
                words,
                softcap or 1.0,
                SOFTCAP=softcap is not None,
                PART=_PART,
                BLOCK=_BLOCK,
                num_warps=8,
            )
    highest = top.amax(1)
    return highest, (total * (top - highest[:, None]).exp_()).sum(1), target.sum(1)


def differentiate(
    logits: Tensor, column: Tensor, lse: Tensor, softcap: float | None, z_loss: float, weights: Tensor | None
) -> None:
    """Turn raw logits [n, V] into the gradient of their losses, in place.

    `column` [n] as for `statistics`, `lse` [n] float32 over the whole vocabulary, `weights` [n] float32 of the losses.
    """
    rows, words = logits.shape
    if not rows:
        return
    with torch.cuda.device_of(logits):
        cross_entropy_gradient_kernel[(rows, triton.cdiv(words, _BLOCK))](
            logits,
            column,
            lse,
            weights,
            words,
            softcap or 1.0,
            z_loss,
            SOFTCAP=softcap is not None,
            BLOCK=_BLOCK,
            num_warps=8,
        )
