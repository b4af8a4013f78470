"""Recipes with a teacher: what is refused, and what it says."""

from __future__ import annotations

import pytest

from bridge.errors import UsageError
from recipes.check import check_recipe
from recipes.config import load_recipe, resolve
from recipes.memory.recipe import report, teacher_bytes

MINIMAL = {
    "output": "run",
    "model": {"hf": "toy"},
    "distill": {"teacher": "larger"},
    "train": {"steps": 10, "global_batch_size": 8, "seq_length": 512},
}


def test_a_recipe_with_a_teacher_is_taken() -> None:
    assert check_recipe(resolve(MINIMAL, ["distill.beta=1", "data.packing=true", "parallel.cp=2"]), 2) == 8
    assert check_recipe(resolve(MINIMAL, ["distill.top_k=8", "distill.cache=true", "lora.rank=4"]), 2) == 4
    assert check_recipe(resolve(MINIMAL, ["distill.lmbda=0.5", "distill.max_new_tokens=64"]), 1) == 8


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.teacher=null", "distill.beta=0"], "distill.beta needs distill.teacher"),
        (["distill.teacher=http://server:8000"], "distill.teacher=http://server:8000: a server's log-probabilities"),
        (["distill.lambda=1"], "unknown key distill.lambda; did you mean distill.lmbda?"),
        (["distill.topk=1"], "did you mean distill.top_k?"),
        (["distill.beta=1.5"], "distill.beta=1.5: must be from 0 to 1"),
        (["distill.lmbda=-1"], "distill.lmbda=-1: must be from 0 to 1"),
        (["distill.temperature=0"], "distill.temperature=0: must be above 0"),
        (["distill.top_k=-1"], "distill.top_k=-1: must be at least 0"),
        (["distill.cross_entropy=nan"], "distill.cross_entropy=nan: is no finite number"),
        (["distill.cache=true"], "distill.cache=true: all of a teacher's words would fill a disk; set distill.top_k"),
        (["distill.cache=true", "distill.top_k=4", "distill.lmbda=1"], "distill.lmbda=1 answers are the model's own"),
        (["distill.max_new_tokens=4"], "distill.max_new_tokens: is of own answers; set distill.lmbda"),
        (["distill.lmbda=1", "distill.max_new_tokens=512"], "leaves no room for a prompt in train.seq_length=512"),
        (["distill.lmbda=1", "data.packing=true"], "data.packing: own answers have rows of their own yet"),
        (["distill.lmbda=1", "data.overlong=split"], "data.overlong: a question cannot be cut"),
        (["distill.lmbda=1", "data.supervise_thinking=false"], "data.supervise_*: what is learnt of an answer"),
        (["train.z_loss=0.1"], "train.z_loss: is not added to divergences"),
        (["preference.loss=sigmoid"], "preference.loss: is another loss; leave it out with distill.teacher"),
        (["grpo.rewards=[number]"], "grpo.rewards: are another loss; leave them out with distill.teacher"),
        (["drafter.path=x"], "drafter.path: has a teacher already (drafter.kl)"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe(resolve(MINIMAL, overrides), 2 if "parallel.cp=2" in overrides else 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_memory_of_a_teacher_is_counted() -> None:
    """Its weights alone, two bytes each, cut as the layout says."""
    one = teacher_bytes(load_recipe("distill/e2b"))
    assert 15.5e9 < one < 16.5e9, "8.0 B parameters"
    cut = load_recipe("distill/e4b")
    assert 30e9 < teacher_bytes(cut) < 32e9, "31 B over two ranks"
    lines, fits = report(cut, 8, 80)
    assert fits and any(
        "and the teacher's weights: 31." in line and "until it has been asked" in line for line in lines
    )
    assert not report(load_recipe("distill/e2b"), 1, 24)[1]
    assert teacher_bytes(load_recipe("sft/e2b")) == 0
