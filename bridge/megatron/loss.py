"""Token losses straight from hidden states: head, softcap and vocabulary-parallel cross entropy in one function.

The logits of a long sequence are the largest tensor of a training step (8,192 tokens × 262,144 words are 8.6 GB in
float32, and as much again for their gradient). Here they exist for a part at a time. The forward pass takes some tokens
and all words: their logits turn into their losses and, in the same buffer, into gradients, of which those of the hidden
states follow at once; the backward pass weighs them, token by token.

The gradient of the weight is a sum over tokens. In float32 the forward pass sums it where it will be returned. In any
other dtype that sum would be a second tensor of twice the size of the weight, read and written for every chunk: there
the backward pass goes through it by words, computes the logits of all tokens and some words again, and has the gradient
of those words from one product. It may add them straight to Megatron's `main_grad`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from bridge.megatron.embedding import head_weight, held_rows, require_rows
from bridge.megatron.kernels import fused
from bridge.token_ids import IGNORE

# Logits of so many bytes exist at a time, in the dtype of the model.
_CHUNK_BYTES = 128 << 20
# Intermediate float32 values are made for so many bytes of logits at a time.
_BLOCK_BYTES = 8 << 20
# Products are made of rows and words in multiples of this: an odd number of rows, and words that do not lie at
# multiples of 16 bytes, sent a GPU's library to slow kernels (docs/benchmarks.md).
_TILE = 64
# Gradients of token losses that differ by less (relative, float32 rounding) are one number.
_SAME = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Head:
    """What does not change from chunk to chunk. `weight` [words, h] holds the words from `first_word` on.

    `local_rows`: of the weight with its padding. They are alike on every rank, and so are the chunks.
    """

    weight: Tensor
    local_rows: int
    first_word: int
    softcap: float | None
    z_loss: float
    group: dist.ProcessGroup | None
    kernels: str

    def chunks(self, positions: Tensor) -> Iterator[Tensor]:
        """`positions` [n] in pieces whose logits fit the budget."""
        rows = max(1, _CHUNK_BYTES // (self.local_rows * self.weight.dtype.itemsize))
        return iter(positions.split(rows - rows % _TILE or rows)) if len(positions) else iter(())

    def logits(self, hidden: Tensor) -> Tensor:
        """Of [n, h]: tanh(logits / cap); raw logits without a softcap, and for kernels, which apply it. [n, V / tp]."""
        logits = hidden @ self.weight.t()
        if fused(self.kernels, logits):
            return logits
        # Rounded to the dtype of the logits after each operation, as transformers and the unfused path do.
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_()

    def capped(self, tanh_logits: Tensor) -> Tensor:
        """The float32 logits that the loss sees, a new tensor."""
        if self.softcap is not None:
            return (tanh_logits * self.softcap).float()
        return tanh_logits.float() if tanh_logits.dtype is not torch.float32 else tanh_logits.clone()

    def blocks(self, tanh_logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Rows of a chunk, few enough that intermediate values stay small, and the same rows of `others`."""
        rows = max(1, _BLOCK_BYTES // (4 * tanh_logits.shape[1]))
        return zip(*(tensor.split(rows) for tensor in (tanh_logits, *others)), strict=True)

    def local(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of `labels` [n] among this rank's words, and whether they are there at all."""
        column = labels - self.first_word
        here = (column >= 0) & (column < self.weight.shape[0])
        return torch.where(here, column, 0), here

    def measure(self, tanh_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over the whole vocabulary and the label's logit, float32 [n] each."""
        top, *local = self._statistics(tanh_logits, *self.local(labels))
        parts = torch.stack(local)
        if self.group is not None:
            own_top = top.clone()
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
            parts[0] *= (own_top - top).exp_()
            dist.all_reduce(parts, group=self.group)
        return parts[0].log_() + top, parts[1]

    def _statistics(self, tanh_logits: Tensor, column: Tensor, here: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of this rank's words: the highest logit, the sum of exp(logit - highest), the label's logit. [n] each."""
        if fused(self.kernels, tanh_logits):
            from bridge.megatron.kernels import cross_entropy

            return cross_entropy.statistics(tanh_logits, torch.where(here, column, -1), self.softcap)
        highest, sums, targets = [], [], []
        for block, col, in_block in self.blocks(tanh_logits, column, here):
            logits = self.capped(block)
            top = logits.amax(-1)
            targets.append(torch.where(in_block, logits.gather(1, col[:, None])[:, 0], 0.0))
            highest.append(top)
            sums.append(logits.sub_(top[:, None]).exp_().sum(-1))
        return torch.cat(highest), torch.cat(sums), torch.cat(targets)

    def differentiate(self, tanh_logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor | None = None) -> None:
        """Turn a chunk of `logits` into the gradient of its (weighted) losses to the raw logits, in place."""
        column, here = self.local(labels)
        if fused(self.kernels, tanh_logits):
            from bridge.megatron.kernels import cross_entropy

            column = torch.where(here, column, -1)
            cross_entropy.differentiate(tanh_logits, column, lse, self.softcap, self.z_loss, weights)
            return
        scale = torch.ones_like(lse) if weights is None else weights
        ones = here.to(lse.dtype)
        for block, col, in_block, z, factor in self.blocks(tanh_logits, column, ones, lse, scale):
            gradient = self.capped(block).sub_(z[:, None]).exp_()
            if self.z_loss:
                gradient *= (1 + 2 * self.z_loss * z)[:, None]
            gradient.scatter_add_(1, col[:, None], -in_block[:, None])
            if weights is not None:
                gradient *= factor[:, None]
            if self.softcap is not None:
                # d (cap · tanh(x / cap)) / dx
                gradient.addcmul_(gradient * block, block, value=-1)
            block.copy_(gradient)


def whole_tiles(rows: Tensor) -> Tensor:
    """`rows` [n, h] and zeros behind them, up to a multiple of `_TILE`; of float32, not for speed, the rows."""
    missing = -len(rows) % _TILE
    return rows if rows.dtype is torch.float32 or not missing else torch.nn.functional.pad(rows, (0, 0, 0, missing))


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [m, k] @ right [k, n], summed in float32; on a GPU also returned so: bf16 results may be summed in bf16."""
    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right


def _add_gradient(total: Tensor, head: Head, hidden: Tensor, labels: Tensor, lse: Tensor, weights: Tensor) -> None:
    """total [V / tp, h] += the gradient of the losses [n], multiplied by `weights` [n], to the weight of `head`.

    `hidden` [n, h], `labels` [n]; `lse` [n] float32 is what `measure` gave over the whole vocabulary.
    """
    n, h = hidden.shape
    if hidden.dtype is torch.float32:
        # By tokens, as in the forward pass: the logits have to be those that `lse` was measured of, to the last bit.
        for rows, targets, z, factors in zip(*map(head.chunks, (hidden, labels, lse, weights)), strict=True):
            tanh_logits = head.logits(rows)
            head.differentiate(tanh_logits, targets, z, factors)
            total.addmm_(tanh_logits.t(), rows)
            del tanh_logits  # before the next chunk's are made
        return
    words = max(_TILE, _CHUNK_BYTES // (n * hidden.dtype.itemsize + h * 4) // _TILE * _TILE)
    hidden = whole_tiles(hidden)  # rows of zeros add nothing
    for first, (rows, part) in enumerate(zip(head.weight.split(words), total.split(words), strict=True)):
        some = replace(head, weight=rows, first_word=head.first_word + first * words)
        tanh_logits = some.logits(hidden)
        some.differentiate(tanh_logits[:n], labels, lse, weights)
        part += product(tanh_logits.t(), hidden)
        del tanh_logits  # before the next words' are made


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        positions: Tensor | None,
        main_grad: Tensor | None,
        squares: Tensor | None,
        options: tuple[Any, ...],
    ) -> Tensor:
        words, *rest = options
        head = Head(weight.detach()[:words], *rest)
        if positions is None:
            positions = (labels != IGNORE).nonzero()[:, 0]
        losses = torch.zeros(len(labels), dtype=torch.float32, device=hidden.device)
        lses = torch.empty(len(positions), dtype=torch.float32, device=hidden.device)
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight) if to_weight and weight.dtype is torch.float32 else None
        for chunk, lse in zip(head.chunks(positions), head.chunks(lses), strict=True):
            rows, targets = hidden.detach()[chunk], labels[chunk]
            tiles = head.logits(whole_tiles(rows))
            tanh_logits = tiles[: len(rows)]
            z, target = head.measure(tanh_logits, targets)
            lse.copy_(z)
            losses[chunk] = z - target + head.z_loss * z * z if head.z_loss else z - target
            if grad_hidden is not None or grad_weight is not None:
                head.differentiate(tanh_logits, targets, z)
            if grad_hidden is not None:
                grad_hidden[chunk] = product(tiles, head.weight)[: len(rows)].to(hidden.dtype)
            if grad_weight is not None:
                grad_weight[:words].addmm_(tanh_logits.t(), rows)
            del tanh_logits, tiles  # before the next chunk's are made
        if squares is not None:
            count = len(squares)  # rows; positions are those of hidden states, [s, b]
            squares[positions % count, positions // count] += lses.double().square_()
        ctx.save_for_backward(hidden, weight, labels, positions, lses)
        ctx.options, ctx.main_grad = options, main_grad
        ctx.gradients = (grad_hidden, grad_weight)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        hidden, weight, labels, positions, lses = ctx.saved_tensors
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy cannot be differentiated twice: its gradients are used in place")
        grad_hidden, grad_weight = ctx.gradients
        main_grad, ctx.gradients, ctx.main_grad = ctx.main_grad, None, None
        if grad_hidden is not None:
            grad_hidden *= grad_losses[:, None]
        if not ctx.needs_input_grad[1]:
            return grad_hidden, None, None, None, None, None, None
        if grad_weight is not None and (factor := _one_factor(grad_losses, positions)) is not None:
            grad_weight *= factor
            if main_grad is not None:
                main_grad += grad_weight
        else:
            grad_weight = None  # before another is made
            total = torch.zeros_like(weight) if main_grad is None else main_grad
            if len(positions):
                words, *rest = ctx.options
                head = Head(weight.detach()[:words], *rest)
                _add_gradient(
                    total[:words], head, hidden.detach()[positions], labels[positions], lses, grad_losses[positions]
                )
            grad_weight = total
        return grad_hidden, grad_weight if main_grad is None else None, None, None, None, None, None


def _one_factor(grad_losses: Tensor, positions: Tensor) -> Tensor | None:
    """What the gradients [n] of all losses at `positions` are, if they are one number."""
    if grad_losses.stride() == (0,) or not len(positions):
        return grad_losses[0]  # as behind a sum: nothing has to be read to know that
    low, high = grad_losses[positions].aminmax()
    return high if float(high - low) <= _SAME * float(high.abs().maximum(low.abs())) else None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    kernels: str = "auto",
    label_positions: Tensor | None = None,
    main_grad: Tensor | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """The loss of every token, float32 [b, s], without the logits [s, b, V] ever being there; 0 where ignored.

    `hidden` [s, b, h], or [s / tp, b, h] under `sequence_parallel`; `weight` [V / tp, h], this rank's rows of the head
    in the order of the ranks of `tp_group`; of those of all ranks, what is behind `vocab_size` is padding: no word, and
    without a gradient. `labels` [b, s] int64, shifted already, `IGNORE` where a position has no loss. `softcap` c means
    c · tanh(logits / c), in the dtype of `hidden`; everything after it is float32. `z_loss` times the squared
    log-sum-exp is added to every loss. `label_positions`: what `positions_with_labels` says, where it is known.
    `kernels` as in `Gemma4TransformerConfig`. `main_grad` [V / tp, h]: the backward pass adds the weight's gradient
    to it, and autograd gets none; of a weight that takes none it is not read. `squares`, float64 [b, s]: the forward
    pass adds to every position that has a loss its squared log-sum-exp, what `z_loss` is the factor of.

    Gradients of hidden states and weight are float32 sums, rounded once to the dtype of their tensors. They may be
    asked for once (no double use of a graph). In float32 cheapest where every token weighs the same, as in a sum.
    A label that is no word raises UsageError: see `require_rows`.
    """
    group = tp_group if tp_group is not None and tp_group.size() > 1 else None
    if group is not None:
        # Each rank's words give a part of the gradient of the hidden states: these sum the parts in the backward pass.
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
    local_rows = weight.shape[0]
    vocab_size = local_rows * size if vocab_size is None else vocab_size
    require_rows(labels, vocab_size, "the head", ignore=IGNORE)
    words = held_rows(vocab_size, local_rows, rank)
    options = (words, local_rows, rank * local_rows, softcap, z_loss, group, kernels)
    losses = _LinearCrossEntropy.apply(
        hidden.flatten(0, 1), weight, labels.t().flatten(), label_positions, main_grad, squares, options
    )
    return losses.view(hidden.shape[:2]).t()


def positions_with_labels(labels: Tensor) -> Tensor:
    """Of `labels` [b, s], in the order of hidden states [s, b]: [n] int64. On a GPU the host would wait for it."""
    return (labels.t().flatten() != IGNORE).nonzero()[:, 0]


class LossContext(NamedTuple):
    """What `fused_loss` is told beside what Megatron hands it: arguments of `linear_cross_entropy`."""

    z_loss: float = 0.0
    label_positions: Tensor | None = None
    squares: Tensor | None = None


def fused_loss(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    labels: Tensor,
    config: Any,
    context: LossContext,
    **unused: Any,
) -> Tensor:
    """`linear_cross_entropy` as Megatron's GPTModel calls an `output_processor`.

    A head without a weight of its own is the embedding of the same stage. There the gradient goes straight to DDP's
    `main_grad`: as autograd's it would lie there, as large as the weight, until the embedding's own is made at the end
    of the backward pass, which is also when DDP hears of the weight. Elsewhere DDP has to see a gradient to go on.

    `unused` are the arguments of other output processors: ids, masks, and the parts of the unfused path.
    """
    weight = head_weight(output_layer, output_weight)
    return linear_cross_entropy(
        hidden_states,
        weight,
        labels,
        vocab_size=config.geometry.vocab_size,
        softcap=config.geometry.logit_softcap,
        z_loss=context.z_loss,
        tp_group=output_layer.tp_group,
        sequence_parallel=config.sequence_parallel,
        kernels=config.kernels,
        label_positions=context.label_positions,
        squares=context.squares,
        main_grad=getattr(weight, "main_grad", None) if output_layer.weight is None else None,
    )
