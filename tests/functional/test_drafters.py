"""Drafters against transformers: the logits and states of every step of a draft, behind every token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import VARIANTS

from .conftest import Toy
from .drafter_kit import Pair, drafted, drafted_with_transformers, with_layout

BOUND = 1e-5
STEPS = 5
LAYOUTS = {"one": Parallel(), "TP2": Parallel(tp=2), "TP2+SP": Parallel(tp=2, sequence_parallel=True)}


def some_ids(folder: Path, rows: int, length: int, seed: int = 0) -> Tensor:
    """Tokens of no picture; rows of three windows and more."""
    geometry = Geometry.from_folder(folder)
    allowed = torch.tensor([i for i in range(8, geometry.vocab_size) if i not in geometry.placeholder_ids])
    return allowed[torch.randint(len(allowed), (rows, length), generator=torch.Generator().manual_seed(seed))]


def assert_same_steps(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    """Logits of words that a head computes, and states, within the bound; and the head computes the same words."""
    for step, ((logits, states), (wanted, wanted_states)) in enumerate(zip(ours, theirs, strict=True), 1):
        length = wanted.shape[1]
        logits, states = logits[:, :length], states[:, :length]
        assert (states - wanted_states).abs().max() / wanted_states.abs().max() <= BOUND, f"step {step}"
        chosen = logits.isfinite()
        assert torch.equal(chosen, wanted.isfinite()), f"step {step}: other words"
        assert ((logits - wanted)[chosen]).abs().max() / wanted[chosen].abs().max() <= BOUND, f"step {step}"


@pytest.mark.parametrize(
    ("variant", "ordered"), [*((v, v in ("e2b", "e4b")) for v in VARIANTS), ("e2b", False), ("31b", True)]
)
def test_steps_of_a_draft(ranks: RankPool, toy: Toy, variant: str, ordered: bool) -> None:
    pair = Pair(toy(variant), toy(variant, drafter=True, ordered=ordered))
    ids = some_ids(pair.target, rows=2, length=32)
    (theirs,) = ranks.run(drafted_with_transformers, pair, ids, STEPS, world_size=1)
    layouts = LAYOUTS if variant in ("e2b", "12b", "26b-a4b") else {"one": Parallel()}
    for name, parallel in layouts.items():
        if variant == "26b-a4b" and name == "TP2":
            continue  # experts need sequence parallelism there
        for ours in ranks.run(drafted, with_layout(pair, parallel), ids, STEPS, world_size=parallel.world_size):
            assert_same_steps(ours, theirs)
