"""Preference training here against TRL on transformers, and in every layout against one rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.case import Case
from bridge.convert.folders import import_hf
from bridge.geometry import Geometry
from bridge.lora.checkpoint import AdapterFolder, write_adapter
from bridge.lora.table import part_name
from bridge.ranks import RankPool
from bridge.verify.reference import load_hf
from recipes.losses.names import DPO, SFT

from .conftest import Toy
from .lora_kit import moved_values
from .preference_kit import SEED, SPEC, Preferences, Theirs, logged, recipe, train_preferences, trl_training

pytest.importorskip("trl")

FIGURES, WEIGHTS = 1e-5, 1e-4
COMPARED = (
    "loss",
    "kl",
    "nll_loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


@pytest.fixture(scope="module")
def adapter(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of E4B's toy, none of it zero, so that policy and reference differ from the first step on."""
    folder = tmp_path_factory.mktemp("adapter")
    import_hf(toy("e4b"), folder / "base")
    write_adapter(folder / "adapter", folder / "base", SPEC, moved_values(SEED, toy("e4b")), lambda *_: torch.float32)
    return folder / "adapter"


def difference(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], name: str) -> float:
    """The largest of all steps, relative to the largest figure of them."""
    pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a - b) for a, b in pairs) / max(abs(b) for _, b in pairs)


def figures_of(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, float]:
    return {name: difference(ours, theirs, name) for name in COMPARED if name in theirs[0] and name in ours[0]}


def trained_apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative difference of any tensor, by its norm."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:4]
    return max((float((t - theirs[name]).norm() / theirs[name].norm()), name) for name, t in ours.items())


def adapter_values(output: Path) -> dict[str, torch.Tensor]:
    held = AdapterFolder.open(output)
    return {part_name(name, part): value.clone() for name, part, value in held.tensors()}


def check(ranks: RankPool, work: Preferences, folder: Path, record_property: Any) -> None:
    theirs: Theirs = ranks.run(trl_training, work, folder / "trl", world_size=1, timeout_s=500)[0]
    said = recipe(work, folder / "ours")
    overrides = [] if work.adapter else [f"export.hf={folder / 'hf'}"]
    assert ranks.run(train_preferences, work, said, overrides, world_size=1, timeout_s=500) == [work.steps]
    found = figures_of(logged(folder / "ours"), theirs.figures)
    if work.adapter:
        ours = adapter_values(folder / "ours")
    else:
        model = load_hf(folder / "hf", Geometry.from_folder(work.toy), torch.float32)
        ours = {name: p.detach() for name, p in model.named_parameters()}
    apart = trained_apart(ours, theirs.trained)
    record_property("worst", f"{found} {apart}")
    print(found, apart)
    assert max(found.values()) <= FIGURES and apart[0] <= WEIGHTS, (found, apart)


BASE = {"reference": "base"}
# Of adapters against the base, and of all weights against what they were, which is computed once.
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid"},
    "mpo": {"loss": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "kto": {"loss": "kto", "desirable_weight": 1.2},
    "apo_zero_unpaired": {"loss": "apo_zero_unpaired"},
    "orpo": {"loss": "orpo"},
    "cpo": {"loss": "cpo"},
    "simpo": {"loss": "simpo", "beta": 2.0, "cpo_alpha": 0.0},
    **{
        name: {"loss": name, **({"label_smoothing": 0.1} if name in ("robust", "exo_pair") else {})}
        for name in DPO
        if name not in ("sigmoid", SFT)
    },
}


def test_dpo_of_adapters_is_trls(
    ranks: RankPool, toy: Toy, adapter: Path, tmp_path: Path, record_property: Any
) -> None:
    said = {**LOSSES["sigmoid"], **BASE}
    check(ranks, Preferences(toy("e4b"), said, spec=SPEC, adapter=adapter), tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "sigmoid"])
def test_every_loss_of_adapters_is_trls(
    ranks: RankPool, toy: Toy, adapter: Path, tmp_path: Path, record_property: Any, name: str
) -> None:
    said = LOSSES[name] if name in ("orpo", "cpo", "simpo") else {**LOSSES[name], **BASE}
    check(ranks, Preferences(toy("e4b"), said, spec=SPEC, adapter=adapter), tmp_path, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sigmoid", "mpo", "kto", "orpo", "cpo", "simpo"])
def test_losses_of_all_weights_are_trls(
    ranks: RankPool, toy: Toy, tmp_path: Path, record_property: Any, name: str
) -> None:
    check(ranks, Preferences(toy("e4b"), LOSSES[name]), tmp_path, record_property)


def counted(case: Case, loss: str | None) -> tuple[int, dict[str, dict[str, int]], int]:
    """On a rank: bytes at most in a step, what it reads from the device, and what outlives it."""
    from benchmarks.full_size import count_ours

    found = count_ours(case, loss=loss)
    return found.peak, found.reads, found.left


MEMORY = 1.1


@pytest.mark.parametrize(
    ("case", "losses"),
    [
        (Case("e4b", "lora", 96, size="toy", recompute="full"), ("sigmoid",)),
        pytest.param(Case("e4b", "lora", 4096, recompute="full"), ("sigmoid", "orpo"), marks=pytest.mark.slow),
    ],
    ids=["toy", "published"],
)
def test_memory_of_a_step(ranks: RankPool, record_property: Any, case: Case, losses: tuple[str, ...]) -> None:
    """A step of preferences holds what one of the same rows learnt as they are holds, and reads nothing besides."""
    ((plain, reads, left),) = ranks.run(counted, case, None, world_size=1, timeout_s=600)
    for loss in losses:
        ((peak, theirs, behind),) = ranks.run(counted, case, loss, world_size=1, timeout_s=600)
        record_property("bytes", f"{loss}: {peak} of {plain}, {peak / plain:.4f}")
        print(loss, peak, plain, peak / plain)
        assert peak <= MEMORY * plain and behind == left
        assert {when: set(where) for when, where in theirs.items()} == {
            when: set(where) for when, where in reads.items()
        }
