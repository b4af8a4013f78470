"""A step on a fake device (`recipes.simulate.fake_device`): nothing is mixed, nothing waits, memory as estimated.

It stands for a GPU where there is none: what the step makes on the host and uses on the device raises, what it reads
back is noted, and the bytes that it holds are counted operation by operation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.case import Case
from bridge.ranks import RankPool

# What a step reads, behind its passes: its sums and the norm of its gradients.
READS = {"recipes/train/step.py:reduce_sums: copy", "recipes/train/gradients.py:gradient_norm: item"}
# Blocks of masks and what a loss holds for a moment are more of a toy than of a model.
MARGIN = 0.1
LENGTH = 16_384


def counted(case: Case, **lora: Any) -> tuple[Any, int]:
    """What a step holds and reads, and what the estimate says that it holds at most. Runs on a rank."""
    from benchmarks.full_size import count_ours, estimated

    return count_ours(case, **lora), estimated(case)


def toy(variant: str, mode: str, recompute: str = "none", **changes: Any) -> Case:
    return replace(Case(variant, mode, LENGTH, recompute=recompute, size="toy"), **changes)


@pytest.mark.parametrize(
    "case",
    [
        toy("e2b", "sft"),
        toy("e4b", "lora", "full"),
        toy("12b", "lora"),
        toy("26b-a4b", "sft", "full"),
        toy("31b", "lora", "selective"),
    ],
    ids=lambda case: f"{case.name}+{case.recompute}",
)
def test_a_step_of_text(ranks: RankPool, case: Case) -> None:
    ((found, guess),) = ranks.run(counted, case, world_size=1)
    assert not found.reads["passes"]
    assert set(found.reads["update"]) == READS
    # From the host come the batch and what is said of its masks.
    assert set(found.copies) <= {"bridge/megatron/visibility.py:send"}
    assert guess == pytest.approx(found.peak, rel=MARGIN)
    # The update makes nothing of the size of what it updates.
    assert found.peaks["update"] - found.persistent - found.left < 0.02 * found.persistent
    # Nothing outlives the step but the load of each layer's experts, for the log, and the scale of the auxiliary loss.
    geometry = case.model.geometry
    experts = 0 if geometry.moe is None else geometry.moe.num_experts
    assert found.left == geometry.num_layers * 8 * experts + 4 * (experts > 0)


@pytest.mark.parametrize(
    ("case", "lora"),
    [(toy("e2b", "sft", media=True), {}), (toy("12b", "lora", media=True), {"dora": True, "dropout": 0.1})],
    ids=["e2b", "12b"],
)
def test_a_step_with_media(ranks: RankPool, case: Case, lora: dict[str, Any]) -> None:
    """Images, and clips where the model has a tower that hears. The estimate leaves towers out."""
    ((found, _),) = ranks.run(counted, case, **lora, world_size=1)
    assert not found.reads["passes"]
    assert set(found.copies) <= {"bridge/megatron/visibility.py:send"}
    assert not found.left
