"""What a run says before its first step: the numbers that can be counted are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridge.ranks import RankPool
from tests.functional.conftest import Toy

from .training_kit import recipe

ADAPTERS = ["lora.rank=4", "lora.targets=all-linear", "lora.exclude=[lm_head]"]


def counted(said: dict[str, Any], overrides: list[str]) -> tuple[dict[str, Any], list[str], int]:
    """The header of a run of one rank, in words too, and how many elements have gradients. Runs on a rank."""
    from recipes.config import resolve
    from recipes.train.header import header, lines
    from recipes.train.setup import build

    run = build(resolve(said, overrides), load=False)
    parameters = {parameter for model in run.models for parameter in model.parameters() if parameter.requires_grad}
    found = header(run, {"rows": 6}, step=3)
    return found, list(lines(found)), sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize(
    ("variant", "overrides"),
    [
        ("e2b", []),
        ("12b", ["model.freeze=[vision,embeddings]"]),
        ("26b-a4b", []),
        ("31b", ADAPTERS),
        ("26b-a4b", [*ADAPTERS, "lora.parameters=[experts.down_proj]", "lora.modules_to_save=[embed_tokens]"]),
    ],
    ids=["e2b", "12b frozen", "26b-a4b", "31b adapters", "26b-a4b adapters"],
)
def test_trained_parameters(ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, overrides: list[str]) -> None:
    said = recipe(toy(variant, dtype="float32"), tmp_path, 12)
    ((found, lines, count),) = ranks.run(counted, said, overrides, world_size=1)
    assert found["trained_parameters"] == count > 0
    assert (found["step"], found["steps"], found["epochs"], found["ranks"], found["dp"]) == (3, 12, 8.0, 1, 1)
    assert f"{count:,} trained parameters on 1 rank(s) dp=1" in lines[1] and "12 steps (behind step 3)" in lines[0]
    assert lines[2] == f"log: {tmp_path}/log.jsonl"
