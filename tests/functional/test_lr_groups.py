"""Learning rates by module group: torch's optimizer with the same groups, in every layout, and when a run goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import UsageError
from bridge.ranks import RankPool

from .conftest import Toy
from .training_kit import LR, Trouble, losses, plain_loop, recipe, train_toy

STEPS, AGAINST_TRANSFORMERS, ANOTHER_LAYOUT = 8, 1e-4, 1e-5
# Of parameters in both the last one counts.
GROUPS = {"embeddings": LR / 5, r"\.mlp\.": 3 * LR, r"layers\.0\.mlp": LR / 2, "vision_tower": 0.0}
FACTORS = {"embed_tokens": 0.2, "layers.0.mlp": 0.5, ".mlp.": 3.0}
TP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]


def said(toy: Path, output: Path, steps: int = STEPS, **groups: float) -> dict[str, Any]:
    found = recipe(toy, output, steps)
    found["optimizer"]["lr_groups"] = dict(groups or GROUPS)
    return found


def worst(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def test_as_torch_with_the_same_groups(ranks: RankPool, toy: Toy, tmp_path: Path, record_property: Any) -> None:
    """On two data-parallel ranks, each with its part of the optimizer; the rates are logged, and go on exactly."""
    (plain,) = ranks.run(plain_loop, str(toy("e2b")), STEPS, 1, 0.0, FACTORS, world_size=1)
    ranks.run(train_toy, said(toy("e2b"), tmp_path / "whole"), [], world_size=2)
    found = worst(losses(tmp_path / "whole"), plain.losses)
    record_property("worst", found)
    assert found <= AGAINST_TRANSFORMERS
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert lines[3]["lr"] == pytest.approx(LR)
    for name, rate in GROUPS.items():
        assert [line[f"lr/{name}"] for line in lines] == pytest.approx([rate / LR * line["lr"] for line in lines])
    for trouble in (Trouble(4, 0, signal.SIGTERM), Trouble()):
        ranks.run(train_toy, said(toy("e2b"), tmp_path / "cut"), [], trouble, world_size=2)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "world", "overrides", "groups"),
    [
        ("e2b", 2, TP2, GROUPS),
        ("e2b", 2, ["parallel.pp=2"], {"embeddings": LR / 5, "projectors": LR}),
        ("e2b", 2, ["parallel.pp=2"], {r"^embedding\.": LR / 5}),
        ("e2b", 4, ["parallel.pp=2", "parallel.overlap=true", "train.micro_batch_size=1"], GROUPS),
        ("26b-a4b", 2, ["parallel.ep=2"], {"router": LR / 10, "experts": LR / 2}),
        ("e2b", 2, [*TP2, "lora.rank=4"], {"lora_b": 16 * LR}),
        ("e2b", 2, ["parallel.pp=2", "lora.rank=4"], {"lora_b": 4 * LR, "vision": LR}),
    ],
    ids=["TP2+SP", "PP2", "PP2, one end of a tied table", "PP2 DP2", "EP2", "LoRA+ TP2+SP", "LoRA+ PP2"],
)
def test_layouts(
    ranks: RankPool,
    toy: Toy,
    tmp_path: Path,
    record_property: Any,
    variant: str,
    world: int,
    overrides: list[str],
    groups: dict[str, float],
) -> None:
    """What one rank makes of them; and not what it makes without them."""
    lora = [key for key in overrides if key.startswith("lora")]
    runs = {"one": (1, lora), "many": (world, overrides), "without": (1, [*lora, "optimizer.lr_groups={}"])}
    for name, (size, keys) in runs.items():
        asked = said(toy(variant), tmp_path / name, 4, **groups)
        if name == "without":
            asked["optimizer"].pop("lr_groups")
            keys = lora
        ranks.run(train_toy, asked, keys, world_size=size)
    one, many, without = (losses(tmp_path / name) for name in runs)
    record_property("worst", worst(many, one))
    print(worst(many, one), worst(without, one))
    assert worst(many, one) <= ANOTHER_LAYOUT
    assert worst(without, one) > 10 * ANOTHER_LAYOUT


def test_a_group_without_a_parameter_is_refused(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"optimizer.lr_groups: 'router' names no parameter; groups are embeddings"):
        ranks.run(train_toy, said(toy("e2b"), tmp_path, router=1e-4), [], world_size=1)
