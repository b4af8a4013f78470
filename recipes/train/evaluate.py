"""Evaluation: the mean loss over every token with a label of every set, whatever the layout and the batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

import torch

from bridge.errors import TrainingError
from bridge.token_ids import IGNORE
from recipes.train.data import Evaluation
from recipes.train.setup import BuiltModel
from recipes.train.signals import StopSignal
from recipes.train.step import Batch, reduce_sums, run_microbatches

# Microbatches that go through a pipeline together, for each of its stages. More hide more of its filling, and make a
# signal wait longer.
_PER_STAGE = 4


def evaluate(
    run: BuiltModel,
    evaluation: Evaluation,
    signalled: StopSignal,
    *,
    accuracy: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float] | None:
    """Values for the log: `eval_loss` over all sets, `eval_loss/NAME` of each that has a name, `eval_tokens`.

    `accuracy`: and `eval_token_accuracy`, how many of the tokens are the likeliest, each behind the true ones before.
    `progress`: is called with the number of tokens so far. Collective. None where any rank was told to stop, which is
    asked after each group of microbatches. Raises TrainingError: a set without a token to predict.
    """
    totals: dict[str, tuple[float, float]] = {}
    right, seen = 0.0, 0
    stages = run.provider.parallel.pp
    size = _PER_STAGE * stages if stages > 1 else 1
    for name, begin in evaluation.items():
        loss, tokens = 0.0, 0.0
        batches = begin()
        while group := list(islice(batches, size)):
            if run.provider.parallel.vpp > 1:
                # An interleaved schedule takes microbatches in multiples of the stages.
                group += [without_rows(group[-1])] * (-len(group) % stages)
            sums = run_microbatches(run, group, train=False, accuracy=accuracy)
            told = sums.new_tensor([float(bool(signalled))])
            more, supervised, *_, correct, stop = reduce_sums(torch.cat([sums, told]))
            if stop:
                return None
            loss, tokens, right = loss + more, tokens + supervised, right + correct
            seen += int(supervised)
            if progress is not None:
                progress(seen)
        if not tokens:
            raise TrainingError(f"evaluation{f' {name}' if name else ''}: no token of the data has a label")
        totals[name] = loss, tokens
    values = _values(totals)
    return values | {"eval_token_accuracy": right / values["eval_tokens"]} if accuracy else values


def _values(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    tokens = sum(count for _, count in totals.values())
    values = {"eval_loss": sum(loss for loss, _ in totals.values()) / tokens, "eval_tokens": tokens}
    return values | {f"eval_loss/{name}": loss / count for name, (loss, count) in totals.items() if name}


def without_rows(batch: Batch) -> Batch:
    """A microbatch of the same shape in which nothing is real and nothing has a label."""
    ids = batch["input_ids"]
    empty = {
        "input_ids": torch.zeros_like(ids),
        "labels": torch.full_like(ids, IGNORE),
        "attention_mask": torch.zeros_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous(),
    }
    if "mm_token_type_ids" in batch:
        empty["mm_token_type_ids"] = torch.zeros_like(ids)
    if "cu_seqlens" in batch:
        # Each row is padding, and a document of its own.
        empty["cu_seqlens"] = torch.arange(len(ids) + 1, dtype=torch.int32) * ids.shape[1]
    return empty
