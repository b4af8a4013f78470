"""Learning rates of every schedule, step by step, against their formulas; and which updates count as spikes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.errors import UsageError
from recipes.config import resolve
from recipes.train.schedule import advance, fitted, make_scheduler, rate_change, shortened
from recipes.train.setup import local_device

STEPS, WARMUP, LR, MIN_LR, WSD = 40, 5, 1e-2, 1e-3, 10


def rates(overrides: list[str]) -> list[float]:
    """The rate of each update, as the loop sets it."""
    said = {
        "output": "run",
        "train": {"steps": STEPS},
        "optimizer": {"lr": LR, "min_lr": MIN_LR, "warmup": WARMUP, "weight_decay": 0.1},
    }
    group: dict[str, Any] = {"params": [], "lr": 0.0, "weight_decay": 0.1}
    recipe = resolve(said, overrides)
    scheduler = make_scheduler(recipe, SimpleNamespace(param_groups=[group]))  # type: ignore[arg-type]
    result = []
    for _ in range(recipe.train.steps):
        assert group["weight_decay"] == 0.1
        result.append(advance(recipe, scheduler)["rate"])
    return result


def between(part: float) -> float:
    """From the rate (part 1) to the least one (part 0)."""
    return MIN_LR + (LR - MIN_LR) * part


WARM = [LR * step / (WARMUP + 1) for step in range(1, WARMUP + 1)]
# How much of the way down is left for steps WARMUP + 1 to the last one, where the last one still has some.
LEFT = [1 - (step - 1 - WARMUP) / (STEPS - WARMUP) for step in range(WARMUP + 1, STEPS + 1)]
DECAYS = {
    "constant": lambda left: LR,
    "linear": lambda left: between(left),
    "cosine": lambda left: between(0.5 * (1 + math.cos(math.pi * (1 - left)))),
}
WSD_DECAYS = {
    "linear": lambda left: between(left),
    "cosine": lambda left: between(0.5 * (1 + math.cos(math.pi * (1 - left)))),
    # Half of what is above the least rate, and half again: 1, 1/2 ... down to 0 behind the end.
    "exponential": lambda left: between(2 * 0.5 ** (1 - left) - 1),
    "minus_sqrt": lambda left: between(1 - math.sqrt(1 - left)),
}


@pytest.mark.parametrize("schedule", DECAYS)
def test_decays(schedule: str) -> None:
    ours = rates([f"optimizer.schedule={schedule}"])
    assert ours == pytest.approx(WARM + [DECAYS[schedule](left) for left in LEFT])


@pytest.mark.parametrize("style", WSD_DECAYS)
def test_constant_then_down(style: str) -> None:
    ours = rates(["optimizer.schedule=wsd", f"optimizer.wsd_steps={WSD}", f"optimizer.wsd_style={style}"])
    flat = [LR] * (STEPS - WSD - WARMUP)
    down = [WSD_DECAYS[style](1 - step / WSD) for step in range(WSD)]
    assert ours == pytest.approx(WARM + flat + down)


# Our schedule, what it is called in transformers, and its arguments there.
IN_TRANSFORMERS: dict[str, tuple[list[str], str, dict[str, Any]]] = {
    "constant": (["optimizer.schedule=constant"], "constant_with_warmup", {}),
    "linear": (["optimizer.schedule=linear", "optimizer.min_lr=0"], "linear", {}),
    "cosine": (["optimizer.schedule=cosine", "optimizer.min_lr=0"], "cosine", {}),
    "cosine with a floor": (["optimizer.schedule=cosine"], "cosine_with_min_lr", {"min_lr": MIN_LR}),
    "wsd": (
        ["optimizer.schedule=wsd", f"optimizer.wsd_steps={WSD}"],
        "warmup_stable_decay",
        {"num_decay_steps": WSD, "min_lr_ratio": MIN_LR / LR, "decay_type": "linear"},
    ),
}


@pytest.mark.parametrize("name", IN_TRANSFORMERS)
@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_behind_the_warm_up_rates_are_those_of_transformers(name: str, warmup: int) -> None:
    import torch
    from transformers import get_scheduler

    overrides, theirs, arguments = IN_TRANSFORMERS[name]
    ours = rates([*overrides, f"optimizer.warmup={warmup}"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = get_scheduler(theirs, optimizer, warmup, STEPS, scheduler_specific_kwargs=arguments)
    expected = []
    for _ in range(STEPS):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert ours[warmup:] == pytest.approx(expected[warmup:], rel=1e-12)
    # In the warm-up transformers' first step has the rate 0; every one of ours learns.
    assert ours[:warmup] == pytest.approx([LR * step / (warmup + 1) for step in range(1, warmup + 1)])


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("style", WSD_DECAYS)
def test_every_step_learns(schedule: str, style: str, steps: int) -> None:
    """However short: a single step has the whole rate."""
    keys = [f"optimizer.schedule={schedule}", f"optimizer.wsd_style={style}", "optimizer.wsd_steps=5"]
    ours = rates([*keys, "optimizer.min_lr=0", f"train.steps={steps}"])
    assert len(ours) == steps and min(ours) > 0 and max(ours) <= LR
    assert steps > 1 or ours == [LR]


def test_a_short_trial_shortens_the_warm_up_and_says_so() -> None:
    keys = ["optimizer.schedule=wsd", "optimizer.warmup=50", "optimizer.wsd_steps=200"]
    recipe = resolve({"output": "run", "train": {"steps": 1000}}, keys)
    assert fitted(recipe) == recipe.optimizer and shortened(recipe) == []
    short = resolve({"output": "run", "train": {"steps": 20}}, keys)
    assert (fitted(short).warmup, fitted(short).wsd_steps) == (2, 4)
    assert shortened(short) == [
        "optimizer.warmup=50 leaves nothing of train.steps=20: it is 2 in this run",
        "optimizer.wsd_steps=200 leaves nothing of train.steps=20: it is 4 in this run",
    ]
    assert short.optimizer.warmup == 50, "the recipe stays as it is, for when it goes on with more steps"


def test_more_steps_for_a_finished_run_change_its_rate_and_are_told() -> None:
    """A cosine that had come down starts up again: said, with what would keep it."""

    def at_the_end(keys: list[str]) -> tuple[Any, Any]:
        said = {"output": "run", "train": {"steps": STEPS}, "optimizer": {"lr": LR, "warmup": WARMUP}}
        recipe = resolve(said, keys)
        group: dict[str, Any] = {"params": [], "lr": 0.0}
        scheduler = make_scheduler(recipe, SimpleNamespace(param_groups=[group]))  # type: ignore[arg-type]
        return recipe, scheduler

    recipe, scheduler = at_the_end([])
    for _ in range(STEPS):
        before = advance(recipe, scheduler)
    assert rate_change(recipe, scheduler, STEPS, before) is None, "it is at its end"
    longer, scheduler = at_the_end([f"train.steps={3 * STEPS}"])
    scheduler.step(STEPS)
    said = rate_change(longer, scheduler, STEPS, before)
    assert said is not None and said.startswith(
        f"train.steps was {STEPS}, is {3 * STEPS}: the learning rate of step 41 is"
    )
    assert f"where step 40 had {before['rate']:.4g} and 0 was to come" in said
    # What it names does keep the rate.
    keys = [word for word in said.split() if word.startswith("optimizer.")]
    kept, scheduler = at_the_end([f"train.steps={3 * STEPS}", *keys])
    scheduler.step(STEPS)
    assert advance(kept, scheduler)["rate"] == pytest.approx(before["rate"], rel=1e-3)
    assert rate_change(kept, scheduler, STEPS, {}) is None, "a checkpoint of an older version says nothing"
    # The same keys again, half way: nothing to be told.
    recipe, scheduler = at_the_end([])
    for _ in range(20):
        before = advance(recipe, scheduler)
    recipe, again = at_the_end([])
    again.step(20)
    assert rate_change(recipe, again, 20, before) is None


def test_a_process_takes_the_gpu_that_it_is_shown() -> None:
    assert [local_device(rank, 8) for rank in (0, 7)] == [0, 7]
    assert local_device(3, 1) == 0  # each process sees its own alone
    with pytest.raises(UsageError, match="rank 4 of this node has no GPU: 4 are visible"):
        local_device(4, 4)
