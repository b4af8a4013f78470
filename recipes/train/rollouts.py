"""Answers that the model under training samples itself, with their rewards, as a stream of microbatches.

What is sampled depends on the seed, the number of the prompt and of its answer alone: neither on the layout nor on
where a run was interrupted. (A server is told the same; its answers also depend on what else it computes at a time.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from bridge.errors import DataError, TrainingError, UsageError
from bridge.generate.opened import stop_token_ids
from bridge.generate.rows import Completion
from bridge.generate.sampling import SamplingOptions
from bridge.geometry import Geometry
from bridge.together import together
from recipes.check import row_multiple
from recipes.config import GrpoConfig, Recipe
from recipes.data.batches import Batches
from recipes.data.blend import Blend, Samples
from recipes.data.chat import Encoded
from recipes.data.collate import batch_tensors, join_media, source_tensors
from recipes.data.questions import Questions
from recipes.data.training import batch_options, model_folder, say
from recipes.losses.grpo import group_advantages, group_std, leave_one_out
from recipes.rewards.check import reward_options
from recipes.rewards.judge import Judged, Judges
from recipes.train.answers import answers
from recipes.train.data import Streams
from recipes.train.engine import ServedModel
from recipes.train.log import Log
from recipes.train.setup import Run
from recipes.train.signals import StopSignal

FOLDER = "rollouts"
# Of the answers, on the terminal.
_SHOWN_CHARACTERS, _SHOWN = 100, 3


class RolloutStopped(Exception):
    """A signal came while answers were sampled: they are sampled again, and alike, when the run goes on."""


@dataclass(frozen=True)
class SampledAnswer:
    """An answer that was sampled to a prompt. `sample`: of the data."""

    sample: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class RewardedAnswer(SampledAnswer):
    """One that is rewarded. `logprobs`: of `tokens`, as they were sampled. `scores`: see `recipes.losses.policy`."""

    logprobs: tuple[float, ...]
    advantage: float
    scores: tuple[float, ...]


def len_of(answer: SampledAnswer) -> int:
    """Tokens of a prompt and its answer."""
    return len(answer.prompt) + len(answer.tokens)


def _plain(row: RewardedAnswer) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    return asdict(row) | {"scores": [None if math.isnan(score) else score for score in row.scores]}


def _row_of(plain: dict[str, Any]) -> RewardedAnswer:
    scores = tuple(math.nan if score is None else score for score in plain["scores"])
    prompt, tokens, logprobs = (tuple(plain[name]) for name in ("prompt", "tokens", "logprobs"))
    return RewardedAnswer(plain["sample"], prompt, tokens, logprobs, plain["advantage"], scores)


def rewarded(completions: Sequence[Completion], rewards: Sequence[Sequence[float]], config: GrpoConfig) -> Tensor:
    """[answers, 1 + 3 + rewards], float64: the advantage, and scores as in `recipes.losses.policy`.

    `rewards` [answers][rewards]; NaN: an answer that could not be rewarded.
    """
    each = torch.tensor(rewards, dtype=torch.float64)
    weights = config.reward_weights or [1.0] * each.shape[1]
    total, size = each @ each.new_tensor(weights), config.num_generations
    if config.loss == "rloo":
        advantages = leave_one_out(total, size)
    else:
        scale = config.scale_rewards
        if scale == "auto":
            scale = "none" if config.loss == "dr_grpo" else "group"
        advantages = group_advantages(total, size, scale)
    truncated = each.new_tensor([float(answer.finish_reason == "length") for answer in completions])
    columns = torch.stack([advantages, total, group_std(total, size), truncated], dim=1)
    return torch.cat([columns, each], dim=1)


def answers_batch(
    rows: Sequence[SampledAnswer],
    questions: Questions,
    geometry: Geometry,
    pad_id: int,
    with_types: bool,
    data: Samples | None = None,
    packed: int = 0,
) -> dict[str, Tensor]:
    """A microbatch of sampled answers with their media, each in a row of its own, or end to end in as many rows of
    together `packed` tokens. `data`: what their samples are of."""
    samples, media = [], []
    for row in rows:
        ids = np.asarray([*row.prompt, *row.tokens], np.int32)
        types = np.zeros(len(ids), np.uint8)
        if with_types:
            types[: len(row.prompt)], found = questions.media(row.sample)
            media.append(found)
        samples.append([Encoded(ids, np.arange(len(ids)) >= len(row.prompt), types)])
    laid = [[sample for row in samples for sample in row]] if packed else samples
    width = packed or max(map(len_of, rows))
    batch = batch_tensors(laid, width=width, pad_id=pad_id, packed=packed > 0, with_types=with_types, answers=True)
    if isinstance(data, Blend) and (count := len(data.sources)) > 1:
        sources = [data.place(row.sample)[0] for row in rows]
        batch |= source_tensors(samples, sources, count=count, width=1, answers=True)
        batch["source_ids"] = batch["answer_sources"][batch["sequence_ids"].clamp(min=0)]
    # A placeholder that was sampled stands for no picture: the sampler too reads padding there.
    answered = (batch["sequence_ids"] >= 0).roll(1)
    for token in geometry.placeholder_ids:
        batch["input_ids"].masked_fill_(answered & (batch["input_ids"] == token), geometry.pad_token_id or 0)
    if packed:
        batch = {
            name: each.view(len(rows), -1) if each.shape[-1:] == (packed,) else each for name, each in batch.items()
        }
    return batch | join_media(media)


def batch_of(
    rows: Sequence[RewardedAnswer],
    questions: Questions,
    geometry: Geometry,
    pad_id: int,
    with_types: bool,
    data: Samples | None = None,
    packed: int = 0,
) -> dict[str, Tensor]:
    """`answers_batch`, and what `recipes.losses.policy` says of its answers."""
    batch = answers_batch(rows, questions, geometry, pad_id, with_types, data, packed)
    sampled = torch.zeros(batch["input_ids"].shape, dtype=torch.float32)
    sampled[batch["sequence_ids"] >= 0] = torch.tensor([logprob for row in rows for logprob in row.logprobs])
    batch["sampled_logps"] = sampled
    batch["advantages"] = torch.tensor([row.advantage for row in rows], dtype=torch.float64)
    batch["scores"] = torch.tensor([row.scores for row in rows], dtype=torch.float64)
    return batch


def packed_length(rows: Sequence[SampledAnswer], rollout: Sequence[SampledAnswer], recipe: Recipe) -> int:
    """Tokens of a packed microbatch of `rows`; 0: they are not packed. Stages expect the same of all of a `rollout`."""
    size = recipe.train.micro_batch_size
    if not recipe.data.packing:
        return 0
    held = [rollout[first : first + size] for first in range(0, len(rollout), size)]
    multiple = size * row_multiple(recipe)
    return (
        max(-(-sum(map(len_of, each)) // multiple) for each in (held if recipe.parallel.pp > 1 else [rows])) * multiple
    )


def check_lengths(questions: Questions, recipe: Recipe, longest: int, key: str) -> None:
    """Raise DataError for a prompt that leaves no room for an answer of `longest` tokens, which `key` says."""
    room = recipe.train.seq_length - longest
    for number in range(len(questions)):
        length = questions.prompt_length(number)
        if length > room:
            raise DataError(
                f"{questions.where(number)}: a prompt of {length} tokens and {key}={longest} are longer than "
                f"train.seq_length={recipe.train.seq_length}"
            )


class Rollouts:
    """A `BatchStream`. Ranks take their microbatches in step: sampling is collective. `log`: rank 0's, once it is open.

    Raises DataError for a prompt that leaves no room for an answer.
    """

    def __init__(self, run: Run, samples: Samples, signalled: StopSignal, log: Callable[[], Log | None]) -> None:
        self._run, self._samples, self._signalled, self._log = run, samples, signalled, log
        self._recipe, self._config = run.recipe, run.recipe.grpo
        self._questions = Questions(samples)
        self._prompts = Batches(samples, replace(batch_options(run.recipe), packing=False, workers=0), say)
        self._judges: Judges | None = None
        self._options = SamplingOptions(
            max_new_tokens=self._config.max_new_tokens,
            temperature=1.0,
            seed=run.recipe.train.seed,
            num_return_sequences=self._config.num_generations,
            stop_token_ids=stop_token_ids(Path(model_folder(run.recipe))),
        )
        self._answers = self._sampler()
        self._rows: list[RewardedAnswer] = []
        self._taken = 0  # rows of the rollout that were taken, every time they were
        self._asked = self._steps = 0  # prompts, and steps that their answers are for, so far
        check_lengths(self._questions, self._recipe, self._config.max_new_tokens, "grpo.max_new_tokens")

    def _sampler(self) -> Callable[..., list[Completion] | None]:
        """Who answers `count` prompts, `prompt(number)`, numbered from `first_index` on; see `answers`."""
        config = self._config
        fixed: dict[str, Any] = {"options": self._options, "decode": self._questions.text, "max_rows": config.max_rows}
        if config.engine_url is None:
            return partial(answers, self._run, signalled=self._signalled, **fixed)
        if self._samples.has_media:
            raise UsageError("grpo.engine=vllm: is asked with tokens, and the data has media; grpo.engine=own samples")
        return partial(ServedModel(self._run, config.engine_url).answers, signalled=self._signalled, **fixed)

    def streams(self, streams: Streams) -> Streams:
        """With the answers in the place of what the data has."""
        sampled = len(self._samples) * self._config.num_generations * self._config.num_iterations
        return replace(streams, train=self, facts={**streams.facts, "rows": sampled})

    def __next__(self) -> dict[str, Tensor]:
        if self._taken == len(self._rows) * self._config.num_iterations:
            self._sample()
        train, dp = self._recipe.train, self._run.groups.dp
        first = (self._taken + dp.rank() * train.micro_batch_size) % len(self._rows)
        self._taken += train.micro_batch_size * dp.size()
        rows = self._rows[first : first + train.micro_batch_size]
        samples, packed = self._samples, packed_length(rows, self._rows, self._recipe)
        return batch_of(
            rows, self._questions, self._run.bridge.geometry, samples.pad_id, samples.has_media, samples, packed
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the next prompts are, and what is left of a rollout of which only some steps were made."""
        used = self._taken == len(self._rows) * self._config.num_iterations
        left = None if used else {"taken": self._taken, "rows": [_plain(row) for row in self._rows]}
        return {"prompts": self._prompts.state_dict(), "asked": self._asked, "steps": self._steps, "rollout": left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. Raises TrainingError where a rollout is left that this recipe cannot go on with."""
        if "asked" not in state:
            raise TrainingError(f"{self._recipe.output}: holds a run without grpo.rewards; choose another output")
        self._prompts.load_state_dict(state["prompts"])
        self._asked, self._steps = state["asked"], state["steps"]
        left = state["rollout"]
        if left is None:
            return
        size = self._config.steps_per_generation * self._recipe.train.global_batch_size
        if len(left["rows"]) != size:
            raise TrainingError(
                f"the checkpoint is in the middle of a rollout of {len(left['rows'])} answers; go on with the "
                "train.global_batch_size and grpo.steps_per_generation that it was made with"
            )
        self._taken = left["taken"]
        self._rows = [_row_of(row) for row in left["rows"]]
        longest = max(len(row.tokens) for row in self._rows)
        if longest > self._config.max_new_tokens:
            raise TrainingError(
                f"the checkpoint is in the middle of a rollout with an answer of {longest} tokens; go on with the "
                "grpo.max_new_tokens that it was made with"
            )

    def close(self) -> None:
        """End the processes of the rewards."""
        if self._judges is not None:
            self._judges.close()

    def _sample(self) -> None:
        """Answers to the next prompts, and their rewards. Collective. Raises RolloutStopped, and nothing is changed."""
        config = self._config
        count = config.steps_per_generation * self._recipe.train.global_batch_size // config.num_generations
        chosen, behind = self._prompts.ahead(count, self._prompts.position)
        samples, questions = [row[0] for row in chosen], self._questions
        found = self._answers(
            prompt=lambda number: questions.prompt(samples[number]), count=count, first_index=self._asked
        )
        if found is None:
            raise RolloutStopped
        asked = [samples[answer.index - self._asked] for answer in found]
        values = rewarded(found, self._rewards(found, asked), config)
        if bool(values[:, 1].isnan().all()):
            raise TrainingError(f"step {self._steps + 1}: not one of {len(found)} answers could be rewarded")
        self._rows = [
            RewardedAnswer(sample, answer.prompt_tokens, answer.tokens, answer.logprobs, value[0], tuple(value[1:]))
            for sample, answer, value in zip(asked, found, values.tolist(), strict=True)
        ]
        self._write(found)
        self._taken, self._asked, self._steps = 0, self._asked + count, self._steps + config.updates
        self._prompts.go_to(behind)

    def _rewards(self, found: Sequence[Completion], asked: Sequence[int]) -> list[list[float]]:
        """[answers][rewards], of rank 0's processes, on every rank. Collective."""
        rewards: list[list[list[float]]] = [[]]
        with together():
            if dist.get_rank() == 0:
                if self._judges is None:
                    workers, limit = self._recipe.data.workers, self._config.reward_timeout
                    self._judges = Judges(reward_options(self._config), limit, workers, self._say)
                rewards[0] = self._judges.values(
                    [
                        Judged(answer.text, self._questions.reference(sample), str(self._questions.where(sample)))
                        for answer, sample in zip(found, asked, strict=True)
                    ]
                )
        dist.broadcast_object_list(rewards, src=0)
        return rewards[0]

    def _say(self, line: str) -> None:
        if (log := self._log()) is not None:
            log.say(line)

    def _write(self, found: Sequence[Completion]) -> None:
        """`rollouts/step-N.jsonl`, every `grpo.samples_every` steps, and the first answers where people look."""
        every, step, log = self._config.samples_every, self._steps + 1, self._log()
        if log is None or not every or self._steps % every >= self._config.updates:
            return
        lines = [self._line(answer, row) for answer, row in zip(found, self._rows, strict=True)]
        path = Path(self._recipe.output) / FOLDER / f"step-{step}.jsonl"
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        partial.rename(path)
        first_lines = lines[:_SHOWN]
        for line in first_lines:
            text = " ".join(str(line["text"]).split())
            log.say(f"rollout: reward {line['reward']}: {text[:_SHOWN_CHARACTERS]}")
        log.texts(
            step, {f"rollout {place}": f"[{line['reward']}] {line['text']}" for place, line in enumerate(first_lines)}
        )

    def _line(self, answer: Completion, row: RewardedAnswer) -> dict[str, Any]:
        total, _, _, *each = (None if math.isnan(score) else score for score in row.scores)
        return {
            "prompt": self._questions.text(row.prompt),
            "text": answer.text,
            "reference": self._questions.reference(row.sample),
            "reward": total,
            "rewards": dict(zip(self._config.rewards, each, strict=True)),
            "advantage": row.advantage,
            "tokens": len(row.tokens),
            "finish_reason": answer.finish_reason,
            "where": str(self._questions.where(row.sample)),
        }
