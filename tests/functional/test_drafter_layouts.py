"""A step of a drafter's recipe is the same in every layout: its loss, and the gradient of every parameter.

Where the model is trained with it, both are those of a plain loop over transformers' classes, too.

The gradients are read off the checkpoint: behind one update, without clipping, Adam's first moment is (1 - beta1) times
the gradient.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bridge.convert.live import read_chunks
from bridge.mapping.table import DRAFTER
from bridge.megatron.draft_loss import DraftLoss
from bridge.ranks import RankPool
from bridge.torch_dist.reader import DistReader
from recipes.config import load_recipe
from recipes.train.loop import train

from .conftest import Toy
from .drafter_kit import Pair, Rows, joint_gradients, joint_gradients_with_transformers
from .test_drafters import assert_same_gradients, some_ids

# What is logged of a step, and the gradients by their keys.
Step = tuple[dict[str, Any], dict[str, Tensor]]
MOMENT = "optimizer.state.exp_avg."
STEP = ["train.steps=1", "train.seq_length=64", "train.micro_batch_size=1", "optimizer.clip=0", "optimizer.warmup=0"]
TP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]
LAYOUTS = {
    "TP2+SP": (2, TP2),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2 PP2": (4, [*TP2, "parallel.pp=2"]),
    "CP2": (2, ["parallel.cp=2"]),
    "DP2": (2, []),
    "PP2 VPP2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
}
EXPERTS = {"EP2": (2, ["parallel.ep=2"]), "EP2 PP2": (4, ["parallel.ep=2", "parallel.pp=2"])}


def step(ranks: RankPool, output: Path, said: list[str], world_size: int = 1) -> Step:
    """What is logged of the first step of a run, and its gradients, times (1 - beta1), by their keys."""
    ranks.run(train, load_recipe("drafter/smoke", [*STEP, *said, f"output={output}"]), world_size=world_size)
    gradients = {}
    with DistReader(output / "iter_0000001", select=lambda key: key.startswith(MOMENT)) as reader:
        for key, tensor in reader.tensors.items():
            parts = [rows for _, rows in read_chunks(reader, key, 0, max(1, (*tensor.shape, 1)[0]), tensor.shape[1:])]
            gradients[key.removeprefix(MOMENT)] = torch.cat(parts).clone()
    (line,) = [each for each in map(json.loads, (output / "log.jsonl").read_text().splitlines()) if "loss" in each]
    return line, gradients


def assert_same(found: Step, one: Step) -> float:
    """Losses within 1e-5, each parameter's gradient within 1e-4; the largest distance of a gradient."""
    for name in one[0]:
        if "loss" in name:
            assert found[0][name] == pytest.approx(one[0][name], rel=1e-5), name
    assert found[1].keys() == one[1].keys()
    furthest = 0.0
    for key, wanted in one[1].items():
        apart = float((found[1][key] - wanted).norm() / wanted.norm().clamp(min=1e-12))
        assert apart <= 1e-4, f"{key}: {apart:.2g}"
        furthest = max(furthest, apart)
    return furthest


def compare(ranks: RankPool, tmp_path: Path, said: list[str], layouts: dict[str, tuple[int, list[str]]]) -> None:
    one = step(ranks, tmp_path / "one", said)
    drafter = {key: gradient for key, gradient in one[1].items() if key.startswith(DRAFTER)} or one[1]
    assert len(drafter) > 20 and all(gradient.norm() > 0 for gradient in drafter.values())
    assert drafter is one[1] or any(gradient.norm() > 0 for key, gradient in one[1].items() if key not in drafter)
    for name, (world_size, layout) in layouts.items():
        found = step(ranks, tmp_path / name, [*said, *layout], world_size)
        print(f"{name}: {assert_same(found, one):.1e}, loss {found[0]['loss']} {one[0]['loss']}")


def of(target: Path, drafter: Path, packed: bool) -> list[str]:
    return [f"model.hf={target}", f"drafter.path={drafter}", f"data.packing={str(packed).lower()}"]


@pytest.mark.parametrize(
    ("variant", "packed", "layouts"),
    [
        ("e2b", True, ("PP2",)),
        pytest.param("e2b", True, tuple(LAYOUTS), marks=pytest.mark.slow),
        pytest.param("e2b", False, tuple(LAYOUTS), marks=pytest.mark.slow),
        pytest.param("12b", True, tuple(LAYOUTS), marks=pytest.mark.slow),
        pytest.param("26b-a4b", True, tuple(EXPERTS), marks=pytest.mark.slow),
    ],
)
def test_a_step(
    ranks: RankPool, toy: Toy, variant: str, packed: bool, layouts: tuple[str, ...], tmp_path: Path
) -> None:
    said = of(toy(variant), toy(variant, drafter=True), packed)
    compare(ranks, tmp_path, said, {name: (LAYOUTS | EXPERTS)[name] for name in layouts})


TRAINED = ["drafter.target=trained"]
JOINT = {"whole": [*TRAINED, "drafter.detach=false"], "detached": TRAINED, "lora": [*TRAINED, "lora.rank=4"]}


@pytest.mark.parametrize(
    ("variant", "kind", "layouts"),
    [
        ("e2b", "whole", ("PP2",)),
        *(pytest.param("e2b", kind, tuple(LAYOUTS), marks=pytest.mark.slow) for kind in JOINT),
        pytest.param("12b", "whole", tuple(LAYOUTS), marks=pytest.mark.slow),
        pytest.param("26b-a4b", "lora", tuple(EXPERTS), marks=pytest.mark.slow),
    ],
)
def test_a_step_of_both(
    ranks: RankPool, toy: Toy, variant: str, kind: str, layouts: tuple[str, ...], tmp_path: Path
) -> None:
    """The model is trained with its drafter: whole, with and without the gradient of drafts, or by LoRA."""
    said = [*of(toy(variant), toy(variant, drafter=True), packed=True), *JOINT[kind]]
    compare(ranks, tmp_path, said, {name: (LAYOUTS | EXPERTS)[name] for name in layouts})


@pytest.mark.parametrize(
    ("variant", "packed", "detach"),
    [
        ("e2b", True, False),
        pytest.param("e2b", False, True, marks=pytest.mark.slow),
        pytest.param("12b", True, False, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_both(ranks: RankPool, toy: Toy, variant: str, packed: bool, detach: bool) -> None:
    """Of every parameter of both, those of a plain loop over transformers' classes."""
    pair = Pair(toy(variant), toy(variant, drafter=True))
    rows = Rows(some_ids(pair.target, rows=1 if packed else 2, length=32), (0, 5, 19) if packed else (0,), packed)
    asked = DraftLoss(steps=3, cross_entropy=0.7, kl=1.3, centroids=0.9)
    (theirs,) = ranks.run(joint_gradients_with_transformers, pair, rows, asked, detach, world_size=1)
    (ours,) = ranks.run(joint_gradients, pair, rows, asked, detach, world_size=1)
    for name, wanted in theirs.items():
        text = {key: gradient for key, gradient in wanted.items() if gradient.norm() > 0}
        assert len(text) > 40
        assert_same_gradients(ours[name], text, name)
