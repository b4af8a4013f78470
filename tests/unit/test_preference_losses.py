"""Losses of preferences against what TRL's trainers make of the same log-probabilities.

`preference_trl.json` holds TRL 1.16's figures: `python -m tests.unit.preference_trl` writes it with TRL's own code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bridge.errors import UsageError
from recipes.check import check_recipe
from recipes.config import PreferenceConfig, resolve
from recipes.losses.names import ALL
from recipes.losses.objective import objective_of

from .preference_cases import CASES, Case, batch_of, token_losses

RECORDED = Path(__file__).with_name("preference_trl.json")
BOUND = 1e-5


class _Alone:
    """A context-parallel group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def figures(case: Case) -> tuple[dict[str, float], Tensor]:
    """What is logged, and the gradient to the token losses."""
    from dataclasses import replace

    objective: Any = objective_of(PreferenceConfig(**case.said))
    batch, losses = batch_of(case), token_losses(case).requires_grad_()
    batch["ref_logps"] = case.reference().double()
    if getattr(objective, "nll", 0.0):
        objective = replace(objective, nll_scale=objective.count(batch) / objective.nll_tokens(batch))
    if case.kl is not None:
        objective = replace(objective, kl=torch.tensor(case.kl, dtype=torch.float64))
    loss, count, (sums,) = objective.sums(losses, batch, _Alone())
    (loss / count).backward()
    assert losses.grad is not None
    return objective.values(dict(zip(objective.names, sums.tolist(), strict=True))), losses.grad


@pytest.mark.parametrize("name", CASES)
def test_is_what_trl_computes(name: str) -> None:
    theirs = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    found, gradient = figures(CASES[name])
    for key, value in theirs["figures"].items():
        assert found[key] == pytest.approx(value, rel=BOUND, abs=1e-7), key
    expected = torch.tensor(theirs["gradient"])
    assert float((gradient - expected).norm() / expected.norm()) <= BOUND


def test_every_loss_has_a_case() -> None:
    named = {loss for case in CASES.values() for loss in case.losses}
    assert named == set(ALL)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["preference.loss=sigmod"], "preference.loss=sigmod: there is none; did you mean sigmoid?"),
        (["preference.loss=[sigmoid,kto]"], "kto cannot be added to others"),
        (["preference.loss=[sigmoid,sigmoid]"], "sigmoid cannot be added to others"),
        (["preference.loss=[sigmoid,sft]", "preference.loss_weights=[1]"], "there are 2 losses"),
        (["preference.loss=orpo", "preference.loss_weights=[1]"], "is for DPO's losses"),
        (["preference.loss=exo_pair"], "must be above 0 with exo_pair"),
        (["preference.loss=sigmoid", "preference.beta=0"], "preference.beta=0: must be above 0"),
        (["preference.loss=sigmoid", "preference.reference=base"], "there are none; start it is"),
        (["preference.loss=sigmoid", "preference.reference=copy"], "is one of auto, base, start"),
        (["preference.loss=sigmoid", "train.z_loss=1e-4"], "train.z_loss=0.0001"),
        (["preference.loss=sigmoid", "data.overlong=split"], "a pair cannot be cut"),
        (["preference.beta=0.2"], "preference.beta needs preference.loss"),
        (["preference.losses=sigmoid"], "did you mean preference.loss?"),
        (["loss_type=sigmoid"], "did you mean preference.loss?"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_built(overrides: list[str], message: str) -> None:
    said = {"output": "run", "model": {"hf": "toy"}, "train": {"steps": 1, "seq_length": 64}}
    with pytest.raises(UsageError) as caught:
        check_recipe(resolve(said, overrides), 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)
