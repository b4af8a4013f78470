"""Logits and gradients of the Megatron model against the oracle, in any parallel layout. Runs on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup

from bridge.convert.live import Gatherer, iter_hf, load_from_hf, load_from_megatron
from bridge.convert.quantized_folder import open_hf_folder
from bridge.errors import VerificationError
from bridge.lora.checkpoint import AdapterFolder
from bridge.lora.inject import attach, fill
from bridge.mapping import Table, table_for
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.context_parallel import gather, take
from bridge.megatron.model import Gemma4Model
from bridge.megatron.parallel import initialize
from bridge.megatron.provider import Gemma4Provider
from bridge.torch_dist.reader import DistReader
from bridge.verify.reference import GRADIENT, LOGITS, Reference
from bridge.verify.result import Check
from bridge.verify.sample import VerificationSample
from bridge.verify.task import ParityTask

# Bounds of the comparison with transformers; a difference above them is a bug until its operation is named.
LOGITS_RELATIVE = 1e-5
GRADIENT_RELATIVE = 1e-4
BF16_KL = 1e-3

ForwardStep = Callable[[Iterator[VerificationSample], torch.nn.Module], tuple[Tensor, Any]]


def run_parity(task: ParityTask) -> list[Check]:
    """Build, load, run Megatron's own schedule, compare the last step. Returns the rows that this rank measured.

    Weights stay as they are. With several steps the data-parallel ranks exchange their rows from step to step.
    """
    groups = initialize(task.parallel)
    provider = Gemma4Provider(
        task.geometry,
        task.parallel,
        task.dtype,
        task.attention_backends,
        overrides={"perform_initialization": False, **task.overrides},
    )
    model = provider.build(groups)
    table = table_for(task.geometry)
    _load(task, model, table)
    wrapped = _in_ddp(task, model, provider.config)
    dp_rank, captured = groups.dp.rank(), list[Tensor]()
    forward_step = _forward_step(task, model[-1], groups.cp, captured)
    for step in range(task.steps):
        rows = _rows_of(task, dp_rank + task.steps - 1 - step, groups.dp.size())
        batches = _batches(task, rows)
        captured.clear()
        _run_schedule(task, wrapped, provider.config, forward_step, batches)

    checks: list[Check] = []
    if task.logits and captured and groups.tp.rank() == groups.cp.rank() == 0:
        ours = [logits[batch.attention_mask.bool()] for logits, batch in zip(captured, batches, strict=True)]
        checks += _compare_logits(task, torch.cat(ours).float(), rows, dp_rank)
    if task.gradients:
        gatherer = Gatherer(model, table, lambda p: getattr(p, "main_grad", None))
        checks += _compare_gradients(task, gatherer)
    return checks


def _load(task: ParityTask, model: list[Gemma4Model], table: Table) -> None:
    if task.megatron:
        with DistReader(task.checkpoint) as reader:
            load_from_megatron(model, table, reader)
    else:
        with open_hf_folder(task.checkpoint) as folder:
            load_from_hf(model, table, folder)
    if task.adapter is not None:
        adapter = AdapterFolder.open(task.adapter)
        attach(model, adapter.table)
        fill(model, adapter.table, adapter.values())


def _in_ddp(task: ParityTask, model: list[Gemma4Model], config: Gemma4TransformerConfig) -> list[torch.nn.Module]:
    """The chunks of a model as Megatron's schedules take them: in DDP where gradients are wanted."""
    wrapped: list[torch.nn.Module] = list(model)
    if task.gradients:
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=task.overlap_grad_reduce)
        wrapped = [DistributedDataParallel(config, ddp, chunk) for chunk in model]
        config.finalize_model_grads_func = finalize_model_grads
    for chunk in wrapped:
        chunk.train(task.gradients)
    return wrapped


def _rows_of(task: ParityTask, dp_rank: int, dp_size: int) -> slice:
    """The rows of the sample that a data-parallel rank computes. Raises VerificationError where they do not divide."""
    rows = task.sample.input_ids.shape[0]
    per_rank = rows // dp_size
    if rows % dp_size or per_rank % task.micro_batch_size:
        raise VerificationError(
            f"{rows} rows do not divide into dp={dp_size} × micro batches of {task.micro_batch_size}"
        )
    first = dp_rank % dp_size * per_rank
    return slice(first, first + per_rank)


def _batches(task: ParityTask, rows: slice) -> list[VerificationSample]:
    starts = range(rows.start, rows.stop, task.micro_batch_size)
    batches = [task.sample.rows(slice(start, start + task.micro_batch_size)) for start in starts]
    return [batch.pack() for batch in batches] if task.packed else batches


def _forward_step(task: ParityTask, last: Gemma4Model, cp: ProcessGroup, captured: list[Tensor]) -> ForwardStep:
    """What Megatron's schedule calls for a batch; `captured` takes the logits [b, s, vocab] of the last stage."""

    def forward_step(iterator: Iterator[VerificationSample], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = next(iterator)
        packed = None if batch.cu_seqlens is None else PackedSeqParams("thd", batch.cu_seqlens, batch.cu_seqlens)
        output = chunk(batch.input_ids, None, batch.attention_mask, packed_seq_params=packed, **batch.features())

        def loss(logits: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            # A copy: Megatron's cross entropy works in place, and in a batch of one row on these very numbers.
            whole = gather(gather_from_tensor_model_parallel_region(logits.detach().clone()), cp)
            captured.append(whole[..., : task.geometry.vocab_size])  # behind it are logits of no word
            counted = take(batch.counted, cp)
            labels = take(batch.labels.clamp(min=0), cp)
            # The last stage's own loss, on [s, b, vocab / tp].
            losses = last.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous())
            return (losses * counted).sum(), counted.sum().to(torch.int), {}

        return output, loss

    return forward_step


def _run_schedule(
    task: ParityTask,
    wrapped: list[torch.nn.Module],
    config: Gemma4TransformerConfig,
    forward_step: ForwardStep,
    batches: list[VerificationSample],
) -> None:
    """Forward, and backward where gradients are wanted, of all batches."""
    if task.gradients:
        for chunk in wrapped:
            chunk.zero_grad_buffer()  # type: ignore[operator]
    rows_per_batch, length = batches[0].input_ids.shape
    with torch.set_grad_enabled(task.gradients):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in wrapped],
            model=wrapped,
            num_microbatches=len(batches),
            seq_length=length * config.pipeline_payload,
            micro_batch_size=rows_per_batch,
            forward_only=not task.gradients,
        )


def _compare_logits(task: ParityTask, ours: Tensor, rows: slice, dp_rank: int) -> list[Check]:
    """`ours`: float32 logits [real tokens of `rows`, vocab]."""
    real = task.sample.attention_mask[rows].bool()

    def row(metric: str, value: float, bound: float | None = None, detail: str = "", at_least: bool = False) -> Check:
        note = ", ".join(text for text in (task.note, f"dp rank {dp_rank}" if dp_rank else "", detail) if text)
        return Check("logits", task.variant, task.parallel, _name(task.dtype), metric, value, bound, note, at_least)

    theirs = Reference(task.references["dtype"])[LOGITS][rows].float()[real]
    whole = "batch with media" if task.sample.names else ""
    largest = theirs.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    exact = task.dtype is torch.float32
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    checks = [
        row("relative", difference / largest, LOGITS_RELATIVE if exact else None, whole),
        row("kl", kl_divergence(theirs, ours), None if exact else BF16_KL, whole),
        row("max_abs_diff", difference, None, whole),
        row("max_abs_logit", largest, None, whole),
        row("top1_agreement", agreement, None, whole, at_least=True),
    ]
    for name in dict.fromkeys(task.sample.names[rows]):
        inside = [other == name for other in task.sample.names[rows]]
        of_rows = real & torch.tensor(inside)[:, None]
        apart = (ours[of_rows[real]] - theirs[of_rows[real]]).abs().max().item()
        largest_there = theirs[of_rows[real]].abs().max().item()
        checks.append(row("relative", apart / largest_there, LOGITS_RELATIVE if exact else None, name))
    if "float32" in task.references:
        truth = Reference(task.references["float32"])[LOGITS][rows].float()[real]
        checks.append(row("kl", kl_divergence(truth, ours), None, "from transformers in float32"))
        checks.append(row("kl", kl_divergence(truth, theirs), None, "transformers' own, from its float32"))
    return checks


def kl_divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference || other) over positions, in nats, of logits [n, vocab]."""
    p, q = torch.log_softmax(reference.double(), -1), torch.log_softmax(other.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def _compare_gradients(task: ParityTask, gatherer: Gatherer) -> list[Check]:
    """The worst ‖Δ‖/‖g‖ over parameters; one that only one side has is infinitely wrong."""
    reference = Reference(task.references["dtype"])
    expected = {name.removeprefix(GRADIENT) for name in reference.names if name.startswith(GRADIENT)}
    worst, where, seen = 0.0, "", set()
    for name, gradient in iter_hf(gatherer):
        if torch.distributed.get_rank() != 0:
            continue
        name = gatherer.table.geometry.in_class(name)
        seen.add(name)
        value = float("inf")
        if name in expected:
            theirs = reference[GRADIENT + name].float()
            difference, norm = (gradient.float() - theirs).norm().item(), theirs.norm().item()
            value = difference / norm if norm else difference
        if not value <= worst:
            worst, where = value, name
    if torch.distributed.get_rank() != 0:
        return []
    lost = sorted(expected - seen)
    if lost:
        worst, where = float("inf"), f"no gradient for {lost[0]}"
    whole = "batch with media" if task.sample.names else ""
    detail = ", ".join(text for text in (task.note, whole, f"{len(seen)} parameters, worst {where}") if text)
    bound = GRADIENT_RELATIVE if task.dtype is torch.float32 else None
    return [Check("gradients", task.variant, task.parallel, _name(task.dtype), "relative", worst, bound, detail)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
