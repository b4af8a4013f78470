"""One step: microbatches through Megatron's schedule, the loss over real tokens, and the optimizer's update."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from bridge.errors import UsageError
from bridge.megatron.accuracy import AccuracyContext, loss_and_accuracy
from bridge.megatron.context_parallel import take
from bridge.megatron.loss import LossContext, positions_with_labels
from bridge.megatron.multimodal import ON_HOST, count_placeholders
from bridge.megatron.visibility import Visibility, send
from bridge.token_ids import IGNORE, check_ids, check_labels
from recipes.check import row_multiple
from recipes.train.gradients import clip_gradients, gradient_norm
from recipes.train.media import MEDIA_NAMES, leave_out
from recipes.train.setup import BuiltModel, Run

Batch = dict[str, Tensor]

# [b, s] each.
_ROWS = {"input_ids", "labels", "attention_mask", "position_ids", "mm_token_type_ids"}
_KNOWN = _ROWS | {"cu_seqlens"} | MEDIA_NAMES
# What is summed over tokens: cross entropy (without the z-loss), how many have a label, how many are real, how many
# there are, the squared log-sum-exp, where there is a z-loss, and how many labels are the likeliest, where asked.
SUMS = ("loss", "supervised", "real", "slots", "squares", "correct")
# What processors give besides, for themselves.
_IGNORED = {"num_soft_tokens_per_image", "num_soft_tokens_per_video"}


def run_microbatches(run: BuiltModel, batches: Sequence[Batch], *, train: bool, accuracy: bool = False) -> Tensor:
    """Forward (and backward, where `train`) passes of this rank's microbatches. `accuracy`: count right tokens too.

    Returns this rank's part of `SUMS`, float64: zeros but on one tensor-parallel rank of the last stage. Gradients are
    of the mean over the tokens with a label, of all microbatches, data-parallel and context-parallel ranks.
    """
    prepared = [prepare(batch, run, run.recipe.train.seq_length) for batch in batches]
    lengths = {each.batch["input_ids"].shape for each in prepared}
    rows, length = prepared[0].batch["input_ids"].shape
    if run.provider.parallel.pp > 1 and len(lengths) > 1:
        raise UsageError(f"microbatches of different shapes {sorted(map(tuple, lengths))} under pipeline parallelism")
    for chunk in run.chunks:
        if chunk.training != train:  # it walks all modules
            chunk.train(train)
    z_loss = run.recipe.train.z_loss if train else 0.0
    step = partial(_forward_step, z_loss=z_loss, cp=run.groups.cp, accuracy=accuracy)
    if train and run.recipe.train.aux_loss:
        _weigh_auxiliary_loss(run, prepared)
    iterators = [map(_with_masks_of_its_own, prepared) for _ in run.chunks]
    with torch.set_grad_enabled(train):
        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=run.chunks if len(run.chunks) > 1 else run.chunks[0],
            num_microbatches=len(prepared),
            seq_length=length * run.config.pipeline_payload,
            micro_batch_size=rows,
            forward_only=not train,
        )
    total = torch.zeros(len(SUMS), dtype=torch.float64, device=run.device)
    if run.groups.tp.rank() == 0:
        for report in reports:
            total += report["sums"]
    return total


class Prepared(NamedTuple):
    """A microbatch on the device of the model, and what is said of it on the host."""

    batch: Batch
    visibility: Visibility
    kept: Tensor
    placeholders: dict[str, int]


def prepare(batch: Batch, run: BuiltModel, length: int) -> Prepared:
    """A microbatch on the device of the model, padded to where its layout needs it. Raises UsageError.

    Media stay behind where no tower is: on every pipeline stage but the first.
    """
    unknown = sorted(set(batch) - _KNOWN - _IGNORED)
    if unknown:
        raise UsageError(f"the data yields {unknown[0]}, which the model does not take")
    media = MEDIA_NAMES & set(batch)
    if media and not run.config.geometry.multimodal:
        raise UsageError(f"the data yields {min(media)}, but this model reads text alone")
    if batch["input_ids"].device.type == "cpu":
        check_ids(batch["input_ids"].numpy(), run.config.geometry, "the data")
        check_labels(batch["labels"].numpy(), run.config.geometry, "the data's labels")
    taken = _KNOWN if run.groups.pp.rank() == 0 else _KNOWN - MEDIA_NAMES
    batch = {name: tensor for name, tensor in batch.items() if name in taken}
    have, parallel = batch["input_ids"].shape[1], run.provider.parallel
    if have > length:
        raise UsageError(f"the data yields sequences of {have} tokens, train.seq_length is {length}")
    if "cu_seqlens" in batch:
        # Bounds count through the rows, which Megatron takes as one.
        have *= batch["input_ids"].shape[0]
        length *= batch["input_ids"].shape[0]
        batch = {name: t.reshape(1, -1) if name in _ROWS else t for name, t in batch.items()}
    # Every microbatch has the shape that pipeline stages expect of each other; context and sequence parallelism cut it.
    want = length if parallel.pp > 1 else have + -have % row_multiple(run.recipe)
    if want != have:
        if "cu_seqlens" in batch:
            raise UsageError(f"packed sequences of {have} tokens: this layout needs {want}, pack to that")
        fill = {"labels": IGNORE, "input_ids": run.config.geometry.pad_token_id or 0}
        for name in _ROWS & set(batch):
            batch[name] = torch.nn.functional.pad(batch[name], (0, want - have), value=fill.get(name, 0))
    visibility = Visibility.of(
        batch["input_ids"], batch.get("attention_mask"), batch.get("cu_seqlens"), batch.get("mm_token_type_ids")
    )
    return Prepared(
        {name: tensor if name in ON_HOST else send(tensor, run.device) for name, tensor in batch.items()},
        visibility.to(run.device),
        send(positions_with_labels(take(batch["labels"], run.groups.cp)), run.device),
        count_placeholders(run.config.geometry, batch["input_ids"]),
    )


def _with_masks_of_its_own(microbatch: Prepared) -> Prepared:
    """Masks are made as layers ask for them, and go with the microbatch: the step's list must not hold on to them."""
    visibility = microbatch.visibility
    host = visibility.host and replace(visibility.host, cache={})
    return microbatch._replace(visibility=replace(visibility, cache={}, host=host))


def _weigh_auxiliary_loss(run: BuiltModel, microbatches: Sequence[Prepared]) -> None:
    """Have a step's auxiliary loss be a mean over all tokens, whatever number of them has a label. Collective.

    Megatron weighs that of a microbatch by its tokens, and in the end divides every gradient by the number of tokens
    with a label: without this, what was asked for would be multiplied by the ratio of the two.
    """
    labels = [microbatch.batch["labels"] for microbatch in microbatches]
    supervised = torch.stack([(row != IGNORE).sum() for row in labels]).sum()
    total = torch.stack([supervised, supervised.new_full((), sum(row.numel() for row in labels))])
    dist.all_reduce(total)
    run.config.moe_grad_scale_func = lambda: (total[0] / total[1])[None]


def _forward_step(
    iterator: Iterator[Prepared], chunk: torch.nn.Module, z_loss: float, cp: dist.ProcessGroup, accuracy: bool
) -> tuple[Tensor, Any]:
    batch, visibility, kept, placeholders = next(iterator)
    packed = None
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].to(torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    squares, correct = torch.zeros(2, dtype=torch.float64, device=batch["labels"].device).unbind()
    counted: dict[str, Any] = {}
    if accuracy:
        context = AccuracyContext(LossContext(z_loss, kept), correct)
        counted = {"output_processor": loss_and_accuracy, "output_processor_context": context}
    losses = chunk(
        batch["input_ids"],
        batch.get("position_ids"),
        batch.get("attention_mask"),
        labels=batch["labels"],
        packed_seq_params=packed,
        mm_token_type_ids=batch.get("mm_token_type_ids"),
        z_loss=z_loss,
        visibility=visibility,
        kept=kept,
        squares=squares if z_loss else None,
        **counted,
        **({"placeholder_counts": placeholders} if placeholders else {}),
        **{name: batch[name] for name in MEDIA_NAMES & set(batch)},
    )

    def total(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        # The losses are of this rank's part of the rows, and what it counts must be of the same.
        loss, tokens = losses.sum(), (take(batch["labels"], cp) != IGNORE).sum()
        mask = batch.get("attention_mask")
        # Filled there: to send a number would be to wait for the device.
        slots = torch.full_like(tokens, losses.numel())
        real = slots if mask is None else take(mask, cp).sum()
        # Float64: the sum of a large batch's float32 losses would round more than a layout may change them.
        entropy = losses.detach().sum(dtype=torch.float64) - z_loss * squares
        sums = torch.stack([x.double() for x in (entropy, tokens, real, slots, squares, correct)])
        return loss, tokens.to(torch.int), {"sums": sums}

    return losses, total


def reduce_sums(sums: Tensor) -> list[float]:
    """Sum over all ranks, as numbers that every rank has alike."""
    dist.all_reduce(sums)
    values: list[float] = sums.tolist()
    return values


def clear_gradients(run: Run) -> None:
    """Before the first microbatch of a step."""
    for chunk in run.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    run.optimizer.zero_grad()


@torch.profiler.record_function("optimizer")
def update(run: Run, largest_norm: float, idle: Collection[Tensor] = ()) -> tuple[float, bool]:
    """Clip and step; (gradient norm before clipping, whether the weights changed). Alike on every rank.

    As Megatron's own `step()`, but an update whose norm is not finite, or above `largest_norm`, is left out: there a
    NaN would reach the weights. `idle`: parameters of towers that no rank had media for in this step
    (see `media.py`).
    """
    optimizer = run.optimizer
    optimizer.prepare_grads()
    norm = gradient_norm(optimizer, run.device)
    if not math.isfinite(norm) or norm > largest_norm:
        return norm, False
    if run.recipe.optimizer.clip:
        clip_gradients(optimizer, run.recipe.optimizer.clip, norm)
    leave_out(optimizer, idle)
    optimizer.step_with_ready_grads()
    return norm, True
