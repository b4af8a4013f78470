"""Evaluation: the mean loss over every token with a label of every set, whatever the layout and the batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

import torch

from bridge.errors import TrainingError
from bridge.token_ids import IGNORE
from recipes.losses.objective import Objective, objective_of
from recipes.train.data import Evaluation
from recipes.train.passes import ANSWERS, Batch
from recipes.train.setup import BuiltModel
from recipes.train.signals import StopSignal
from recipes.train.step import reduce_sums, run_microbatches

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
    objective = objective_of(run.recipe.preference)
    totals: dict[str, list[float]] = {}
    right, seen = 0.0, 0
    stages = run.provider.parallel.pp
    size = _PER_STAGE * stages if stages > 1 else 1
    for name, begin in evaluation.items():
        figures = [0.0] * len(objective.names)
        batches = begin()
        while group := list(islice(batches, size)):
            if run.provider.parallel.vpp > 1:
                # An interleaved schedule takes microbatches in multiples of the stages.
                group += [without_rows(group[-1])] * (-len(group) % stages)
            sums = run_microbatches(run, group, train=False, accuracy=accuracy)
            told = sums.new_tensor([float(bool(signalled))])
            *found, correct, stop = reduce_sums(torch.cat([sums, told]))
            if stop:
                return None
            figures, right = [a + b for a, b in zip(figures, found, strict=False)], right + correct
            seen += int(found[1])
            if progress is not None:
                progress(seen)
        if not figures[1]:
            raise TrainingError(f"evaluation{f' {name}' if name else ''}: no token of the data has a label")
        totals[name] = figures
    values = _values(objective, totals)
    return values | {"eval_token_accuracy": right / values["eval_tokens"]} if accuracy else values


def _values(objective: Objective, totals: Mapping[str, list[float]]) -> dict[str, float]:
    def of(figures: list[float]) -> dict[str, float]:
        return objective.values(dict(zip(objective.names, figures, strict=True)))

    total = [sum(each) for each in zip(*totals.values(), strict=True)]
    counted = "tokens" if objective.counted == "supervised" else objective.counted
    values = {f"eval_{name}": value for name, value in of(total).items()} | {f"eval_{counted}": total[1]}
    return values | {f"eval_loss/{name}": of(figures)["loss"] for name, figures in totals.items() if name}


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
        empty |= {name: batch[name][:0] for name in ANSWERS & set(batch)}
    if "mm_token_type_ids" in batch:
        empty["mm_token_type_ids"] = torch.zeros_like(ids)
    if "cu_seqlens" in batch:
        # Each row is padding, and a document of its own.
        empty["cu_seqlens"] = torch.arange(len(ids) + 1, dtype=torch.int32) * ids.shape[1]
    return empty
