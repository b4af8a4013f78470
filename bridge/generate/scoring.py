"""How likely a model holds answers that are given: one pass over each, several packed into one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from bridge.errors import UsageError
from bridge.generate.loop import evaluating
from bridge.generate.memory import MAX_ROWS
from bridge.generate.rows import Continuation, Likelihood
from bridge.generate.stages import through_stages
from bridge.megatron.accuracy import losses_and_likeliest
from bridge.megatron.kv_cache import padded
from bridge.megatron.loss import LossContext, positions_with_labels
from bridge.megatron.model import Gemma4Model
from bridge.megatron.multimodal import Gemma4MultimodalModel
from bridge.megatron.visibility import Visibility
from bridge.token_ids import IGNORE, check_ids

OnScore = Callable[[Likelihood], None]


def score(
    chunks: Sequence[Gemma4Model],
    groups: ProcessGroupCollection,
    rows: Sequence[Continuation],
    *,
    max_rows: int = MAX_ROWS,
    prefill_tokens: int = 2048,
    on_score: OnScore | None = None,
) -> list[Likelihood]:
    """The likelihoods, in the order of `rows`, on every rank. Collective over all ranks that hold the model.

    Up to `max_rows` rows and `prefill_tokens` tokens go through at a time on a replica (a longer row alone). `on_score`
    is called on every rank of the replica that read the row. A placeholder is padding, as in generation. Raises
    UsageError for context parallelism, and for a row that cannot be read.
    """
    if groups.cp.size() > 1:
        raise UsageError(f"cp={groups.cp.size()}: continuations are packed as they come; score with cp=1")
    for index, row in enumerate(rows):
        if not row.prompt or not row.tokens:
            raise UsageError(f"continuation {index}: it has {len(row.prompt)} tokens, {len(row.tokens)} behind them")
        check_ids(np.asarray([*row.prompt, *row.tokens]), chunks[0].config.geometry, f"continuation {index}")
    replicas, found = groups.dp.size(), list[Likelihood]()
    passes = list(_passes(rows, max_rows, prefill_tokens))
    with evaluating(chunks):
        # Experts of one layer may lie on several replicas: all of them take every pass, also those without a row.
        for first in range(0, len(passes), replicas):
            mine = passes[first : first + replicas][groups.dp.rank() :][:1]
            for each in _scored(chunks, groups, rows, mine[0] if mine else []):
                found.append(each)
                if on_score is not None:
                    on_score(each)
    if replicas > 1:
        parts: list[list[Likelihood]] = [[] for _ in range(replicas)]
        dist.all_gather_object(parts, found, group=groups.dp)
        found = [each for part in parts for each in part]
    return sorted(found, key=lambda each: each.index)


def _passes(rows: Sequence[Continuation], max_rows: int, max_tokens: int) -> Iterator[list[int]]:
    """The numbers of the rows of each pass, the longest first: what needs most memory needs it at once."""
    lengths = [len(row.prompt) + len(row.tokens) - 1 for row in rows]
    taken, tokens = list[int](), 0
    for index in sorted(range(len(rows)), key=lambda index: -lengths[index]):
        if taken and (len(taken) == max_rows or tokens + lengths[index] > max_tokens):
            yield taken
            taken, tokens = [], 0
        taken.append(index)
        tokens += lengths[index]
    if taken:
        yield taken


class _Packed(NamedTuple):
    """Rows in one sequence, padding behind them: [1, n] each, and the bounds of the rows and of the padding."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    bounds: Tensor


def _pack(rows: Sequence[Continuation], multiple: int, pad: int) -> _Packed:
    """The last token of a row has nothing to say: it is a label only."""
    ids, labels, positions, bounds = list[int](), list[int](), list[int](), [0]
    for row in rows:
        whole = [*row.prompt, *row.tokens]
        ids += whole[:-1]
        labels += [IGNORE] * (len(row.prompt) - 1) + list(row.tokens)
        positions += range(len(whole) - 1)
        bounds.append(len(ids))
    filler = padded(len(ids), multiple) - len(ids)
    bounds.append(len(ids) + filler)
    whole_rows = ([*ids, *[pad] * filler], [*labels, *[IGNORE] * filler], [*positions, *range(filler)])
    input_ids, targets, position_ids = (torch.tensor([row]) for row in whole_rows)
    return _Packed(input_ids, targets, position_ids, torch.tensor(bounds))


def _scored(
    chunks: Sequence[Gemma4Model],
    groups: ProcessGroupCollection,
    rows: Sequence[Continuation],
    indices: Sequence[int],
) -> list[Likelihood]:
    """One pass over some of the rows."""
    model, config = chunks[0], chunks[0].config
    device = next(p.device for chunk in chunks for p in chunk.parameters())
    multiple = groups.tp.size() if config.sequence_parallel else 1
    packed = _pack([rows[index] for index in indices], multiple, config.geometry.pad_token_id or 0)
    input_ids, labels = packed.input_ids.to(device), packed.labels.to(device)
    label_positions = positions_with_labels(labels)
    embeddings = None
    if model.pre_process:
        embeddings = model.embed(model.text_ids(input_ids) if isinstance(model, Gemma4MultimodalModel) else input_ids)
    output = through_stages(
        chunks,
        groups,
        input_ids,
        embeddings,
        position_ids=packed.position_ids.to(device),
        visibility=Visibility.of(packed.input_ids, cu_seqlens=packed.bounds).to(device),
        labels=labels,
        output_processor=losses_and_likeliest,
        output_processor_context=LossContext(label_positions=label_positions),
    )
    told = torch.zeros(len(indices), 2, dtype=torch.float64, device=device)
    if output is not None:
        losses, right = output
        row_of = torch.bucketize(label_positions, packed.bounds[1:].to(device), right=True)
        told[:, 0].index_add_(0, row_of, -losses[0, label_positions].double())
        told[:, 1].index_add_(0, row_of, (~right).double())
    if groups.pp.size() > 1:
        dist.broadcast(told, group=groups.pp, group_src=groups.pp.size() - 1)
    return [
        Likelihood(index, logprob, wrong == 0) for index, (logprob, wrong) in zip(indices, told.tolist(), strict=True)
    ]
