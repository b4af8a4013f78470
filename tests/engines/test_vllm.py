"""vLLM on a CPU serves what is exported: log-probabilities and answers are those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.ranks import RankPool
from bridge.toy import VARIANTS
from tests.engines.kit import HEAD_DIM, Answer, Ask, ask_vllm, expected, furthest, prompts
from tests.functional.conftest import Toy
from tests.functional.training_kit import recipe, train_toy

pytestmark = pytest.mark.engine

BOUND, APART = 1e-4, 0.1


def trained(ranks: RankPool, folder: Path, output: Path) -> Path:
    """The folder that a short run of all weights exports at its end."""
    said = recipe(folder, output / "run", steps=3) | {"export": {"hf": str(output / "trained")}}
    ranks.run(train_toy, said, [], world_size=1)
    return output / "trained"


def agree(served: list[Answer], folder: Path) -> float:
    """How far log-probabilities are from those of transformers on a folder. Greedy answers are the same."""
    theirs = expected(folder, prompts(folder))
    assert [answer.tokens for answer in served] == [answer.tokens for answer in theirs]
    return furthest(served, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_model(ranks: RankPool, toy: Toy, variant: str, tmp_path: Path) -> None:
    base = toy(variant, head_dim=HEAD_DIM)
    folder = trained(ranks, base, tmp_path)
    (served,) = ask_vllm(folder, [Ask(prompts(folder))], tmp_path)
    difference = agree(served, folder)
    print(f"{variant}: {difference:.1e} from transformers")
    assert difference <= BOUND
    assert furthest(served, expected(base, prompts(base), max_tokens=1)) > APART
