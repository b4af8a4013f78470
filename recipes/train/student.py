"""A student's data: the data's own answers, or in a share of the steps the student's (GKD, arXiv 2306.13649)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bridge import Gemma4Bridge
from bridge.errors import UsageError
from bridge.generate.opened import stop_token_ids
from bridge.generate.sampling import SamplingOptions
from recipes.data.batches import Batches
from recipes.data.blend import Samples
from recipes.data.questions import Questions
from recipes.data.training import batch_options, model_folder, say
from recipes.train.answers import answers
from recipes.train.data import Streams
from recipes.train.rollouts import RolloutStopped, SampledAnswer, answers_batch, check_lengths
from recipes.train.setup import Run
from recipes.train.signals import StopSignal
from recipes.train.teacher import build_teacher, check_media
from recipes.train.teacher_cache import ask_once


def with_teacher(run: Run, teacher: Gemma4Bridge, streams: Streams, signalled: StopSignal) -> Streams:
    """Let the teacher speak: live, or what it said once; and where asked let the student answer. Collective.

    Raises a BridgeError, and so where batches are not made of the recipe's own data, of which more has to be known.
    """
    said, samples = run.recipe.distill, streams.trained
    if samples is None and (said.cache or said.lmbda):
        raise UsageError(f"distill.{'cache' if said.cache else 'lmbda'}: needs data.path, and data is given otherwise")
    if samples is not None and samples.has_media:
        check_media(teacher.geometry, run.bridge.geometry, f"distill.teacher={said.teacher}")
    if said.cache:
        ask_once(run, teacher, streams, say)
    else:
        run.teacher = build_teacher(run, teacher)
    if said.lmbda and samples is not None:
        return replace(streams, train=StudentAnswers(run, samples, signalled))
    return streams


class StudentAnswers:
    """A `BatchStream` of the data's rows, in whose place in a share `distill.lmbda` of the steps the model's own
    answers to them stand. Which steps, and what is drawn, depends on the seed and the number of the step alone.

    Ranks take their microbatches in step: sampling is collective. Raises DataError: a prompt that leaves no room.
    """

    def __init__(self, run: Run, samples: Samples, signalled: StopSignal) -> None:
        self._run, self._samples, self._signalled = run, samples, signalled
        self._recipe, self._config = run.recipe, run.recipe.distill
        self._questions = Questions(samples)
        dp = run.groups.dp
        self._batches = Batches(samples, batch_options(run.recipe, dp.rank(), dp.size()), say)
        self._options = SamplingOptions(
            max_new_tokens=self._config.max_new_tokens,
            temperature=1.0,
            seed=run.recipe.train.seed,
            stop_token_ids=stop_token_ids(Path(model_folder(run.recipe))),
        )
        self._steps = self._taken = 0  # steps that were begun; microbatches of this one that were taken
        self._rollout: list[SampledAnswer] = []
        check_lengths(self._questions, self._recipe, self._config.max_new_tokens, "distill.max_new_tokens")

    def __next__(self) -> dict[str, Tensor]:
        if self._taken in (0, self._run.microbatches):
            self._begin()
        number, self._taken = self._taken, self._taken + 1
        if not self._rollout:
            return next(self._batches)
        size, dp = self._recipe.train.micro_batch_size, self._run.groups.dp
        first = size * (number * dp.size() + dp.rank())
        samples, geometry = self._samples, self._run.bridge.geometry
        rows = self._rollout[first : first + size]
        return answers_batch(rows, self._questions, geometry, samples.pad_id, samples.has_media, samples)

    def state_dict(self) -> dict[str, Any]:
        """Between steps, which is all there is to say."""
        return self._batches.state_dict() | {"steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state)
        self._steps = state.get("steps", 0)

    def close(self) -> None:
        """End the threads."""
        self._batches.close()

    def _begin(self) -> None:
        """A step: its answers, where they are own. Collective. Raises RolloutStopped before anything is changed."""
        draw = np.random.default_rng([self._recipe.train.seed, self._steps]).random()
        self._rollout = self._sampled() if draw < self._config.lmbda else []
        self._steps, self._taken = self._steps + 1, 0

    def _sampled(self) -> list[SampledAnswer]:
        count, questions = self._recipe.train.global_batch_size, self._questions
        chosen, behind = self._batches.ahead(count, self._batches.position)
        samples = [row[0] for row in chosen]
        found = answers(
            self._run,
            lambda number: questions.prompt(samples[number]),
            count,
            self._options,
            questions.text,
            self._signalled,
            max_rows=self._config.max_rows,
            first_index=self._steps * count,
        )
        if found is None:
            raise RolloutStopped
        self._batches.go_to(behind)
        first = self._steps * count
        return [SampledAnswer(samples[each.index - first], each.prompt_tokens, each.tokens) for each in found]
