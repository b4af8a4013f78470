"""What a model says while it trains: answers to a few prompts at each evaluation, with its weights as they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from bridge.errors import UsageError
from bridge.generate.acceptance import Acceptance
from bridge.generate.loop import Decode
from bridge.generate.opened import stop_token_ids
from bridge.generate.output import record
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from recipes.config import Recipe
from recipes.data.prompts import PromptEncoder, read_prompts
from recipes.data.questions import Questions
from recipes.data.training import model_folder
from recipes.metrics.named import find_metrics
from recipes.train.answers import AnswerMetrics, Say, answers
from recipes.train.data import Streams
from recipes.train.setup import Run
from recipes.train.signals import StopSignal
from recipes.train.sinks import Values

FOLDER = "samples"
# Of an answer on the terminal, and how many answers.
_SHOWN_CHARACTERS, _SHOWN = 100, 3


@dataclass(frozen=True)
class Samples:
    """The prompts of `train.samples`, by their numbers, and the answers that are wanted, where they are known."""

    prompt: Callable[[int], Prompt]
    count: int
    options: SamplingOptions
    decode: Decode
    reference: Callable[[int], str] | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Samples | None:
        """The prompts of a file; None where a recipe names none. Raises DataError that names the line of a prompt that
        cannot be read, and UsageError for a file without one."""
        path = recipe.train.samples
        if not isinstance(path, str):
            return None
        encoder = PromptEncoder(Path(model_folder(recipe)), allow_urls=recipe.data.allow_urls)
        prompts = tuple(read_prompts(Path(path), encoder))
        if not prompts:
            raise UsageError(f"train.samples={path}: holds no prompts")
        decode = encoder.decode
        return cls(prompts.__getitem__, len(prompts), _options(recipe), lambda tokens: decode(list(tokens)))

    @classmethod
    def of_evaluation(cls, recipe: Recipe, streams: Streams) -> Samples | None:
        """The first questions of the evaluation data, of its sets in their order; None where no number is asked for."""
        count = recipe.train.samples
        if not isinstance(count, int):
            return None
        sets = [Questions(samples) for samples in streams.evaluated.values()]
        places = [(questions, number) for questions in sets for number in range(min(len(questions), count))][:count]
        if not places:
            raise UsageError(f"train.samples={count}: there is no evaluation data to take prompts from")
        return cls(
            lambda number: places[number][0].prompt(places[number][1]),
            len(places),
            _options(recipe),
            sets[0].text,
            lambda number: places[number][0].reference(places[number][1]),
        )

    def answer(self, run: Run, step: int, signalled: StopSignal, say: Say) -> list[Completion] | None:
        """Answer, and write `samples/step-N.jsonl` on rank 0. Collective; training goes on as if nothing had been.

        None where any rank was told to stop, which is asked after every few prompts.
        """
        found = answers(run, self.prompt, self.count, self.options, self.decode, signalled)
        if found is not None and dist.get_rank() == 0:
            self._write(Path(run.recipe.output) / FOLDER / f"step-{step}.jsonl", found)
            for completion in found[:_SHOWN]:
                say(f"sample {completion.index}: {_short(completion.text)}")
        return found

    def _write(self, path: Path, completions: Sequence[Completion]) -> None:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        lines = (json.dumps(self._line(completion), ensure_ascii=False) + "\n" for completion in completions)
        partial.write_text("".join(lines), encoding="utf-8")
        partial.rename(path)

    def _line(self, completion: Completion) -> dict[str, object]:
        line = record(completion)
        return line if self.reference is None else line | {"reference": self.reference(completion.index)}


def acceptance_values(answers: Sequence[Completion]) -> Values:
    """For the log, of answers that a drafter drafted: accepted tokens a pass, and how many of those at each place."""
    acceptance = Acceptance.of(answers)
    places = {f"eval_acceptance/{place}": rate for place, rate in enumerate(acceptance.rates, 1)}
    return {"eval_mean_accepted_length": acceptance.mean_length, **places}


def _options(recipe: Recipe) -> SamplingOptions:
    return SamplingOptions(
        max_new_tokens=recipe.train.sample_tokens,
        temperature=recipe.train.sample_temperature,
        seed=recipe.train.seed,
        stop_token_ids=stop_token_ids(Path(model_folder(recipe))),
    )


def metrics_of(recipe: Recipe, streams: Streams) -> AnswerMetrics | None:
    """What `eval.metrics` asks for, on the evaluation data; None where it names nothing. Raises UsageError."""
    said = recipe.eval
    if not said.metrics:
        return None
    if not streams.evaluated:
        raise UsageError("eval.metrics: there is no evaluation data to take questions from")
    options = SamplingOptions(
        max_new_tokens=said.metric_tokens, stop_token_ids=stop_token_ids(Path(model_folder(recipe)))
    )
    sets = {name: Questions(samples, said.metric_rows) for name, samples in streams.evaluated.items()}
    return AnswerMetrics(find_metrics(said.metrics, "eval.metrics"), sets, options)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[:_SHOWN_CHARACTERS] + " …"
