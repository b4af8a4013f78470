"""Evaluation: the mean loss over every token with a label of every set, whatever the layout and the batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from bridge.errors import TrainingError
from recipes.losses.names import KTO
from recipes.losses.objective import AnswerLoss, Objective
from recipes.losses.policy import evaluated_objective
from recipes.train.data import Evaluation
from recipes.train.passes import in_groups
from recipes.train.reference import divergence
from recipes.train.setup import BuiltModel
from recipes.train.signals import StopSignal
from recipes.train.step import reduce_sums, run_microbatches


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
    objective = evaluated_objective(run.recipe)
    totals: dict[str, list[float]] = {}
    right, seen = 0.0, 0
    for name, begin in evaluation.items():
        figures = [0.0] * len(objective.names)
        if isinstance(objective, AnswerLoss) and objective.name == KTO:
            objective = replace(objective, kl=divergence(run, in_groups(run, begin())))
        for group in in_groups(run, begin()):
            sums = run_microbatches(run, group, train=False, accuracy=accuracy, objective=objective)
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
