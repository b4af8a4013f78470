"""Microbatches on their way through the model: prepared for the layout, and driven by Megatron's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
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
from recipes.data.collate import KL
from recipes.train.drafter import Drafting
from recipes.train.media import MEDIA_NAMES
from recipes.train.setup import BuiltModel

Batch = dict[str, Tensor]

# [b, s] each.
_ROWS = {
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "mm_token_type_ids",
    "sequence_ids",
    "sampled_logps",
    "source_ids",
}
# [answers] each.
ANSWERS = {"completion_lengths", "desirable", "ref_logps", "advantages", "scores", "answer_sources"}
# Of each label, row by row: what a teacher says that was asked once, and where that is kept.
LABELS = {"teacher_ids", "teacher_logps", "label_ids"}
_KNOWN = _ROWS | ANSWERS | LABELS | {"cu_seqlens"} | MEDIA_NAMES
# Microbatches that go through a pipeline together without gradients, for each of its stages. More hide more of its
# filling, and make a signal wait longer.
_PER_STAGE = 4
# What processors give besides, for themselves.
_IGNORED = {"num_soft_tokens_per_image", "num_soft_tokens_per_video", "sample_ids", "source_counts"}


# An `output_processor` of Megatron's GPTModel, and its context.
Output = tuple[Callable[..., Tensor], Any]


class Prepared(NamedTuple):
    """A microbatch on the device of the model, and what is said of it on the host. `output`: what the last stage makes
    of its hidden states, in the place of the token losses."""

    batch: Batch
    visibility: Visibility
    label_positions: Tensor
    placeholders: dict[str, int]
    output: Output | None = None


def prepare(batch: Batch, run: BuiltModel, length: int) -> Prepared:
    """A microbatch on the device of the model, padded to where its layout needs it. Raises UsageError.

    Media stay behind where no tower is: on every pipeline stage but the first.
    """
    unknown = sorted(name for name in set(batch) - _KNOWN - _IGNORED if not name.startswith(KL))
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
        batch = {name: t.reshape(1, -1) if name in _ROWS else t for name, t in batch.items()}
    # Every microbatch has the shape that pipeline stages expect of each other; context and sequence parallelism cut it.
    # Those that are packed have it already.
    fixed = parallel.pp > 1 and "cu_seqlens" not in batch
    want = length if fixed else have + -have % row_multiple(run.recipe)
    if want != have:
        if "cu_seqlens" in batch:
            raise UsageError(f"packed sequences of {have} tokens: this layout needs {want}, pack to that")
        fill = {"labels": IGNORE, "sequence_ids": -1, "input_ids": run.config.geometry.pad_token_id or 0}
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


class Passed(NamedTuple):
    """What of a microbatch is there when its token losses are, float64. `squares` [b, s / cp], where there is a z-loss,
    else []: see `LossContext`; `correct` []: see `AccuracyContext`."""

    batch: Batch
    squares: Tensor
    correct: Tensor


# (token losses [b, s / cp], what is known of their microbatch) -> (the sum to differentiate, its count, a report)
Total = Callable[[Tensor, Passed], tuple[Tensor, Tensor, dict[str, Any]]]


def through(
    run: BuiltModel,
    microbatches: Sequence[Prepared],
    total: Total,
    *,
    train: bool,
    z_loss: float = 0.0,
    accuracy: bool = False,
) -> list[dict[str, Any]]:
    """Forward (and backward, where `train`) passes; the reports of `total`, on ranks of the last stage. Collective."""
    lengths = {each.batch["input_ids"].shape for each in microbatches}
    rows, length = microbatches[0].batch["input_ids"].shape
    if run.provider.parallel.pp > 1 and len(lengths) > 1:
        raise UsageError(f"microbatches of different shapes {sorted(map(tuple, lengths))} under pipeline parallelism")
    # A frozen model has no backward pass for stages to hand on: its drafter has its own, behind each forward pass.
    drafter_only, counts = train and run.drafts_alone, list[Tensor]()
    for chunk in run.chunks:
        if chunk.training != (train and not drafter_only):  # it walks all modules
            chunk.train(train and not drafter_only)
    total = partial(_with_backward, total=total, counts=counts) if drafter_only else total
    cp = run.groups.cp.size()
    step = partial(_forward_step, total=total, z_loss=z_loss, accuracy=accuracy, drafting=run.drafting, cp=cp)
    iterators = [map(_with_masks_of_its_own, microbatches) for _ in run.chunks]
    with torch.set_grad_enabled(train):
        reports: list[dict[str, Any]] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=run.chunks if len(run.chunks) > 1 else run.chunks[0],
            num_microbatches=len(microbatches),
            seq_length=length * run.config.pipeline_payload,
            micro_batch_size=rows,
            forward_only=drafter_only or not train,
        )
    if drafter_only:
        count = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int, device=run.device)
        run.config.finalize_model_grads_func(list(run.chunks), count.to(torch.int), pg_collection=run.groups)
    return reports


def _with_backward(
    losses: Tensor, passed: Passed, total: Total, counts: list[Tensor]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """`total`, its sum differentiated at once; what it is a mean over goes to `counts`."""
    loss, count, report = total(losses, passed)
    loss.backward()
    counts.append(count)
    return loss.detach(), count, report


def in_groups(run: BuiltModel, batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """Microbatches without gradients, as many at a time as a pipeline wants."""
    stages = run.provider.parallel.pp
    size = _PER_STAGE * stages if stages > 1 else 1
    while group := list(islice(batches, size)):
        if run.provider.parallel.vpp > 1:
            # An interleaved schedule takes microbatches in multiples of the stages.
            group += [without_rows(group[-1])] * (-len(group) % stages)
        yield group


def mismatched_rows(batch: Batch) -> Batch:
    """The rows of a batch whose answers stand behind other prompts, as a batch of its own, with the prompts' media."""
    of_prompts = {name: tensor for name, tensor in batch.items() if name in MEDIA_NAMES}
    return of_prompts | {name.removeprefix(KL): batch[name] for name in batch if name.startswith(KL)}


def without_rows(batch: Batch) -> Batch:
    """A microbatch of the same shape in which nothing is real and nothing has a label."""
    ids = batch["input_ids"]
    empty = {
        "input_ids": torch.zeros_like(ids),
        "labels": torch.full_like(ids, IGNORE),
        "attention_mask": torch.zeros_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
    }
    if "sequence_ids" in batch:
        empty["sequence_ids"] = torch.full_like(ids, -1)
        empty |= {name: batch[name][:0] for name in (ANSWERS | {"sample_ids"}) & set(batch)}
    if any(name.startswith(KL) for name in batch):
        empty |= {f"{KL}{name}": tensor for name, tensor in without_rows(mismatched_rows(batch)).items()}
    empty |= {name: batch[name][:0] for name in LABELS & set(batch)}
    if "mm_token_type_ids" in batch:
        empty["mm_token_type_ids"] = torch.zeros_like(ids)
    if "cu_seqlens" in batch:
        # Each row is padding, and a document of its own.
        empty["cu_seqlens"] = torch.arange(len(ids) + 1, dtype=torch.int32) * ids.shape[1]
    return empty


def _with_masks_of_its_own(microbatch: Prepared) -> Prepared:
    """Masks are made as layers ask for them, and go with the microbatch: the step's list must not hold on to them."""
    visibility = microbatch.visibility
    host = visibility.host and replace(visibility.host, cache={})
    return microbatch._replace(visibility=replace(visibility, cache={}, host=host))


def _forward_step(
    iterator: Iterator[Prepared],
    chunk: torch.nn.Module,
    total: Total,
    z_loss: float,
    accuracy: bool,
    drafting: Drafting | None,
    cp: int,
) -> tuple[Tensor, Any]:
    batch, visibility, label_positions, placeholders, output = next(iterator)
    packed = None
    if "cu_seqlens" in batch:
        bounds = batch["cu_seqlens"].to(torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    rows, length = batch["labels"].shape
    zeros = partial(torch.zeros, dtype=torch.float64, device=batch["labels"].device)
    squares, correct = zeros((rows, length // cp) if z_loss else ()), zeros(())
    counted: dict[str, Any] = {}
    media: dict[str, Any] = {name: batch[name] for name in MEDIA_NAMES & set(batch)}
    media |= {"placeholder_counts": placeholders} if placeholders else {}
    if drafting is not None:
        losses = drafting.losses(chunk, batch, packed, visibility, LossContext(z_loss, label_positions), **media)
        return losses, lambda losses: total(losses, Passed(batch, squares, correct))
    if accuracy:
        context = AccuracyContext(LossContext(z_loss, label_positions), correct)
        output = loss_and_accuracy, context
    if output is not None:
        counted = {"output_processor": output[0], "output_processor_context": output[1]}
    losses = chunk(
        batch["input_ids"],
        batch.get("position_ids"),
        batch.get("attention_mask"),
        labels=batch["labels"],
        packed_seq_params=packed,
        mm_token_type_ids=batch.get("mm_token_type_ids"),
        z_loss=z_loss,
        visibility=visibility,
        label_positions=label_positions,
        squares=squares if z_loss else None,
        **counted,
        **media,
    )

    return losses, lambda losses: total(losses, Passed(batch, squares, correct))
