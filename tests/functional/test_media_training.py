"""Training on pictures and sounds against a plain transformers and torch loop, in several layouts."""

from __future__ import annotations

import contextlib
import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.megatron.visibility import FORWARD, GENERATE
from bridge.ranks import RankPool

from .media_training_kit import PICTURES, SOUNDS, plain_media_loop, train_media
from .test_training import AGAINST_TRANSFORMERS, CP2, PP2, TP2, worst
from .training_kit import Trouble, losses, recipe

pytest.importorskip("torchvision", reason="transformers' Gemma 4 processors need torchvision")

STEPS = 6
CASES: dict[str, tuple[str, int, list[str]]] = {
    "e4b": ("e4b", 1, []),
    "12b": ("12b", 1, []),
    "12b forward": ("12b", 1, ["model.vision_mask=forward"]),
    "26b-a4b": ("26b-a4b", 1, []),
    "e4b sounds": ("e4b", 1, []),
    "26b-a4b frozen": ("26b-a4b", 1, ["model.freeze=[vision]"]),
    "e4b sounds DP2, overlap": ("e4b", 2, ["parallel.overlap=true", "train.micro_batch_size=1"]),
    "e4b sounds TP2+SP": ("e4b", 2, TP2),
    "e4b sounds PP2": ("e4b", 2, PP2),
    "12b CP2": ("12b", 2, CP2),
    "26b-a4b EP2": ("26b-a4b", 2, ["parallel.ep=2"]),
}


class Plain:
    """The plain loops, each run once."""

    def __init__(self, ranks: RankPool, toy: Callable[..., Path]) -> None:
        self._ranks, self._toy = ranks, toy
        self._done: dict[tuple[Any, ...], list[float]] = {}

    def __call__(self, variant: str, sounds: bool, frozen: str = "", vision_mask: str = GENERATE) -> list[float]:
        key = (variant, sounds, frozen, vision_mask)
        if key not in self._done:
            kinds = SOUNDS if sounds else PICTURES
            options = str(self._toy(variant)), STEPS, kinds, frozen, vision_mask
            self._done[key] = self._ranks.run(plain_media_loop, *options, world_size=1)[0]
        return self._done[key]


@pytest.fixture(scope="module")
def plain(ranks: RankPool, toy: Callable[..., Path]) -> Plain:
    return Plain(ranks, toy)


@pytest.mark.parametrize("name", CASES)
def test_media_train_as_in_transformers(
    ranks: RankPool, toy: Callable[..., Path], plain: Plain, tmp_path: Path, record_property: Any, name: str
) -> None:
    variant, world, overrides = CASES[name]
    kinds = SOUNDS if "sounds" in name else PICTURES
    frozen, vision_mask = "vision" if "frozen" in name else "", FORWARD if "forward" in name else GENERATE
    theirs = plain(variant, "sounds" in name, frozen, vision_mask)
    said = recipe(toy(variant), tmp_path, STEPS)
    assert ranks.run(train_media, said, overrides, kinds, world_size=world, timeout_s=180) == [(False, STEPS)] * world
    record_property("worst", worst(losses(tmp_path), theirs))
    assert worst(losses(tmp_path), theirs) <= AGAINST_TRANSFORMERS


def test_media_resume_elsewhere(
    ranks: RankPool, toy: Callable[..., Path], plain: Plain, tmp_path: Path, record_property: Any
) -> None:
    """Stopped after the first step with media, and again after one without; on from there in another layout."""
    said = recipe(toy("e4b"), tmp_path, STEPS)
    for step, (world, overrides) in enumerate(((2, []), (2, TP2), (2, PP2), (1, [])), 1):
        trouble = Trouble(step, 0, signal.SIGTERM)
        stopped = ranks.run(train_media, said, overrides, SOUNDS, trouble, world_size=world, timeout_s=180)
        assert stopped == [(True, step)] * world
    theirs = plain("e4b", True)
    record_property("worst", worst(losses(tmp_path), theirs))
    assert worst(losses(tmp_path), theirs) <= AGAINST_TRANSFORMERS


def said_by(*arguments: Any) -> tuple[tuple[bool, int], str]:
    """`train_media`, and what it said on this rank."""
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        return train_media(*arguments), stream.getvalue()


def test_another_vision_mask_is_said_when_a_run_goes_on(
    ranks: RankPool, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a run of 0.1, which did not note whose mask it had, and of one whose key was changed."""
    said, record = recipe(toy("12b"), tmp_path, STEPS), tmp_path / "iter_0000001" / "progress.json"
    stop = Trouble(1, 0, signal.SIGTERM)
    ranks.run(train_media, said, ["model.vision_mask=forward"], PICTURES, stop, world_size=1)
    noted = json.loads(record.read_text())
    assert noted["vision_mask"] == FORWARD and noted["sense_updates"] == {"vision": 1, "audio": 0}
    del noted["vision_mask"]
    record.write_text(json.dumps(noted))
    line = (
        "model.vision_mask: images and video of the updates so far were under {}; from here on they are under {}, "
        "which masks differently (docs/attention.md); model.vision_mask={} goes on as before\n"
    )
    for step, override, expected in (
        (2, "generate", ("forward, the only one of release 0.1", "generate", "forward")),
        (3, "generate", None),
        (4, "forward", ("generate", "forward", "generate")),
    ):
        stop = Trouble(step, 0, signal.SIGTERM)
        overrides = [f"model.vision_mask={override}"]
        ((ended, text),) = ranks.run(said_by, said, overrides, PICTURES, stop, world_size=1)
        assert ended == (True, step) and text.count("model.vision_mask") == (2 if expected else 0), text
        assert expected is None or line.format(*expected) in text, text
