"""Learning rates of every schedule, step by step, against their formulas; and which updates count as spikes."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.errors import UsageError
from recipes.config import resolve
from recipes.train.setup import local_device, make_scheduler

STEPS, WARMUP, LR, MIN_LR, WSD = 40, 5, 1e-2, 1e-3, 10


def rates(overrides: list[str]) -> list[float]:
    """The rate of each update, as the loop sets it."""
    said = {
        "output": "run",
        "train": {"steps": STEPS},
        "optimizer": {"lr": LR, "min_lr": MIN_LR, "warmup": WARMUP, "weight_decay": 0.1},
    }
    group: dict[str, Any] = {"params": [], "lr": 0.0, "weight_decay": 0.1}
    scheduler = make_scheduler(resolve(said, overrides), SimpleNamespace(param_groups=[group]))  # type: ignore[arg-type]
    result = []
    for _ in range(STEPS):
        scheduler.step(1)
        result.append(group["lr"])
        assert group["weight_decay"] == 0.1
    return result


def between(part: float) -> float:
    """From the rate (part 1) to the least one (part 0)."""
    return MIN_LR + (LR - MIN_LR) * part


DECAYS = {
    "constant": lambda left: LR,
    "linear": lambda left: between(left),
    "cosine": lambda left: between(0.5 * (1 + math.cos(math.pi * (1 - left)))),
}
WSD_DECAYS = {
    "linear": lambda left: between(left),
    "cosine": lambda left: between(0.5 * (1 + math.cos(math.pi * (1 - left)))),
    # Half of what is above the least rate, and half again: 1, 1/2 ... down to 0 at the end.
    "exponential": lambda left: between(2 * 0.5 ** (1 - left) - 1),
    "minus_sqrt": lambda left: between(1 - math.sqrt(1 - left)),
}


@pytest.mark.parametrize("schedule", DECAYS)
def test_decays(schedule: str) -> None:
    ours = rates([f"optimizer.schedule={schedule}"])
    warm = [LR * step / WARMUP for step in range(1, WARMUP + 1)]
    left = [(STEPS - step) / (STEPS - WARMUP) for step in range(WARMUP + 1, STEPS + 1)]
    assert ours == pytest.approx(warm + [DECAYS[schedule](part) for part in left])


@pytest.mark.parametrize("style", WSD_DECAYS)
def test_constant_then_down(style: str) -> None:
    ours = rates(["optimizer.schedule=wsd", f"optimizer.wsd_steps={WSD}", f"optimizer.wsd_style={style}"])
    warm = [LR * step / WARMUP for step in range(1, WARMUP + 1)]
    flat = [LR] * (STEPS - WSD - WARMUP)
    down = [WSD_DECAYS[style](1 - step / WSD) for step in range(1, WSD + 1)]
    assert ours == pytest.approx(warm + flat + down)
    assert ours[-1] == pytest.approx(MIN_LR)


def test_a_process_takes_the_gpu_that_it_is_shown() -> None:
    assert [local_device(rank, 8) for rank in (0, 7)] == [0, 7]
    assert local_device(3, 1) == 0  # each process sees its own alone
    with pytest.raises(UsageError, match="rank 4 of this node has no GPU: 4 are visible"):
        local_device(4, 4)
