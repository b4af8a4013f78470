"""Answers of a model as it stands, a few prompts at a time, and what metrics make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from bridge.generate.loop import Decode, Generator
from bridge.generate.memory import MAX_ROWS
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.together import together
from recipes.data.questions import Questions
from recipes.metrics.named import Metric
from recipes.train.setup import BuiltModel
from recipes.train.signals import StopSignal

Say = Callable[[str], None]


def answers(
    run: BuiltModel,
    prompt: Callable[[int], Prompt],
    count: int,
    options: SamplingOptions,
    decode: Decode,
    signalled: StopSignal,
    progress: Callable[[int], None] | None = None,
    max_rows: int = MAX_ROWS,
    first_index: int = 0,
) -> list[Completion] | None:
    """The answers to prompts 0 to `count` - 1. Collective; training goes on as if nothing had been.

    A drafter that is trained drafts them. None where any rank was told to stop, which is asked after every few prompts.
    `progress`: the answers so far. Those
    to a prompt are numbered from `first_index` on: what is drawn depends on that number alone.
    """
    run.gather_weights()
    speculator = None if run.drafting is None else run.drafting.speculator(run.models, run.groups)
    generator = Generator(run.models, run.groups, decode=decode, max_rows=max_rows, speculator=speculator)
    at_once = max(1, generator.max_rows * generator.replicas.size() // options.num_return_sequences)
    found: list[Completion] = []
    for first in range(0, count, at_once):
        told = torch.tensor([float(bool(signalled))], dtype=torch.float64, device=run.device)
        dist.all_reduce(told)
        if told:
            return None
        with together():
            prompts = [prompt(number) for number in range(first, min(count, first + at_once))]
        found += generator.generate(prompts, options, first_index + first)
        if progress is not None:
            progress(len(found))
    return found


@dataclass(frozen=True)
class AnswerMetrics:
    """Metrics of the answers to `sets` of questions, by the names of the sets ("": the only one)."""

    metrics: tuple[Metric, ...]
    sets: Mapping[str, Questions]
    options: SamplingOptions

    def measure(
        self,
        run: BuiltModel,
        signalled: StopSignal,
        say: Say,
        progress: Callable[[int], None] | None = None,
        max_rows: int = MAX_ROWS,
    ) -> dict[str, float] | None:
        """Means over the answers: METRIC over all sets, and METRIC/SET of each that has a name. Collective.

        Rank 0 measures. None where any rank was told to stop. Raises DataError where a user's function fails.
        """
        sums: dict[str, list[float]] = {}
        total, truncated = 0, 0
        for name, questions in self.sets.items():
            found = answers(
                run, questions.prompt, len(questions), self.options, questions.text, signalled, progress, max_rows
            )
            if found is None:
                return None
            sums[name] = self._sums(questions, found)
            total, truncated = total + len(found), truncated + sum(answer.finish_reason == "length" for answer in found)
        if truncated:
            say(f"{truncated} of {total} answers to questions were cut off at {self.options.max_new_tokens} tokens")
        values = {}
        for place, metric in enumerate(self.metrics):
            values[metric.name] = sum(of[place] for of in sums.values()) / total
            for name, of in sums.items():
                if name:
                    values[f"{metric.name}/{name}"] = of[place] / len(self.sets[name])
        return values

    def _sums(self, questions: Questions, found: Sequence[Completion]) -> list[float]:
        sums = [0.0] * len(self.metrics)
        with together():
            for answer in found if dist.get_rank() == 0 else ():
                reference, where = questions.reference(answer.index), questions.where(answer.index)
                for place, metric in enumerate(self.metrics):
                    sums[place] += metric.of(answer.text, reference, where)
        shared = [sums]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]
