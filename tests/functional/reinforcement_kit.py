"""What ranks run for the tests of sampled and rewarded answers.

What they call lives here, so that they import nothing but this.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.geometry import Geometry

LENGTH = 160
LORA = {
    "rank": 4,
    "alpha": 8,
    "targets": r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
}


def write_questions(path: Path, count: int, pictures: bool = False) -> Path:
    """Sums, and their results; with a picture of noise to every second one where asked."""
    from PIL import Image

    dice, rows = random.Random(0), []
    for number in range(count):
        a, b = dice.randrange(10), dice.randrange(10)
        question: list[dict[str, str]] = [{"type": "text", "text": f"{a}+{b}"}]
        if pictures and number % 2:
            name = f"{number}.png"
            Image.frombytes("RGB", (60, 80), dice.randbytes(3 * 60 * 80)).save(path.parent / name)
            question.insert(0, {"type": "image", "path": name})
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": str(a + b)}]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(toy: Path, data: Path, output: Path) -> dict[str, Any]:
    return {
        "output": str(output),
        "model": {"hf": str(toy), "dtype": "float32"},
        "data": {"path": str(data), "cache": str(data.parent / "cache")},
        "grpo": {
            "rewards": ["length"],
            "reward_length": 8,
            "num_generations": 4,
            "max_new_tokens": 8,
            "samples_every": 1,
        },
        "train": {"steps": 2, "global_batch_size": 8, "micro_batch_size": 4, "seq_length": LENGTH},
        "optimizer": {"lr": 2e-3, "min_lr": 2e-3, "schedule": "constant"},
    }


@dataclass(frozen=True)
class Sampled:
    """The tokens of a rollout, and how far at most what the sampler said of one is from what the trainer says.

    `prompts`: how many different ones; `placeholders`: sampled tokens that are some.
    """

    tokens: list[tuple[int, ...]]
    apart: float
    prompts: int
    placeholders: int


def sample(said: dict[str, Any], layout: list[str]) -> Sampled:
    """On every rank: a rollout, and its log-probabilities again."""
    import torch.distributed as dist

    from recipes.config import resolve
    from recipes.data.training import prepared
    from recipes.losses.policy import policy_loss
    from recipes.train.passes import prepare
    from recipes.train.reference import log_probabilities
    from recipes.train.rollouts import Rollouts
    from recipes.train.setup import build
    from recipes.train.signals import StopSignal

    asked, data = prepared(resolve(said, layout))
    run = build(asked, load=True)
    streams = data(asked, run.bridge.geometry, run.groups.dp.rank(), run.groups.dp.size())
    assert streams.trained is not None
    rollouts = Rollouts(run, streams.trained, StopSignal(), lambda: None)
    try:
        batches = [next(rollouts) for _ in range(run.microbatches)]
    finally:
        rollouts.close()
    held = [prepare(batch, run, LENGTH) for batch in batches]
    found = log_probabilities(run, held, policy_loss(asked.grpo).logps)
    apart = torch.zeros((), dtype=torch.float64)
    for each, logps in zip(held, found, strict=bool(found)):
        mask = each.batch["sequence_ids"] >= 0
        apart = torch.maximum(apart, (logps - each.batch["sampled_logps"]).abs()[mask].max())
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    rows, placeholders = rollouts._rows, run.bridge.geometry.placeholder_ids
    return Sampled(
        [row.tokens for row in rows],
        float(apart),
        len({row.sample for row in rows}),
        sum(token in placeholders for row in rows for token in row.tokens),
    )


@dataclass
class FixedRollouts:
    """This rank's microbatches of answers that are there, as if they had been sampled: the same in every layout."""

    recipe: Any
    samples: Any
    geometry: Geometry
    dp_rank: int
    dp_size: int
    taken: int = 0

    def __post_init__(self) -> None:
        from recipes.data.questions import Questions

        self.questions = Questions(self.samples)
        self.rows = [self._row(index) for index in range(2 * self.recipe.train.global_batch_size)]

    def __next__(self) -> dict[str, Tensor]:
        from recipes.train.rollouts import batch_of, packed_length

        size = self.recipe.train.micro_batch_size
        start = self.taken + self.dp_rank * size
        self.taken += size * self.dp_size
        rows = self.rows[start : start + size]
        packed = packed_length(rows, self.rows, self.recipe)
        return batch_of(rows, self.questions, self.geometry, 0, self.samples.has_media, self.samples, packed)

    def _row(self, index: int) -> Any:
        from recipes.train.rollouts import RewardedAnswer

        generator = torch.Generator().manual_seed(index)

        def some(count: int) -> tuple[int, ...]:
            return tuple((8 + torch.randint(0, 120, (count,), generator=generator)).tolist())

        sample, tokens = index % len(self.samples), some(2 + 3 * index % 11)
        # A toy's are about as likely as that.
        logprobs = (-5 + 0.5 * torch.randn(len(tokens), generator=generator)).tolist()
        reward, advantage = torch.randn(2, generator=generator, dtype=torch.float64).tolist()
        return RewardedAnswer(
            sample, self.questions.prompt(sample).ids, tokens, tuple(logprobs), advantage, (reward, 1.0, 0.0, reward)
        )

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def train_fixed(said: dict[str, Any], overrides: list[str]) -> int:
    """On every rank: train on answers that are there; the last step."""
    from recipes.config import resolve
    from recipes.data.training import prepared
    from recipes.train.data import Streams
    from recipes.train.loop import train

    asked, own = prepared(resolve(said, overrides))

    def data(recipe: Any, geometry: Geometry, dp_rank: int, dp_size: int) -> Streams:
        samples = own(recipe, geometry, dp_rank, dp_size).trained
        return Streams(FixedRollouts(recipe, samples, geometry, dp_rank, dp_size))

    return train(asked, data).step


def train_sampling(
    said: dict[str, Any], overrides: list[str], stop_when_asked: int = 0, kill: str = ""
) -> tuple[bool, int]:
    """On every rank: train; (stopped, last step). `stop_when_asked`: a signal comes before it is so often asked for;
    with `kill` "asked" the process dies there instead, with "rewarded" behind its first rewards."""
    import os
    import signal as signals

    from recipes.config import resolve
    from recipes.rewards.judge import Judges
    from recipes.train.loop import train
    from recipes.train.signals import StopSignal

    class Signal(StopSignal):
        asked = 0

        def __bool__(self) -> bool:
            self.asked += 1
            due = bool(stop_when_asked) and self.asked >= stop_when_asked
            if due and kill == "asked":
                os.kill(os.getpid(), signals.SIGKILL)
            return due

    rewarded = Judges.values

    def deadly(self: Judges, *arguments: Any) -> Any:
        rewarded(self, *arguments)
        os.kill(os.getpid(), signals.SIGKILL)

    if kill == "rewarded":
        Judges.values = deadly  # type: ignore[method-assign] - of a process that ends there

    with Signal() as signal:
        outcome = train(resolve(said, overrides), signalled=signal)
    return outcome.stopped, outcome.step


def logged(output: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """These figures of every step that a run logged."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in ("step", *names) if name in line} for line in lines]
