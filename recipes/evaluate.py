"""`evaluate`: the loss and the token accuracy of a model on data, and metrics of its answers, as training has them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bridge.generate.memory import MAX_ROWS
from bridge.generate.task import ModelTask
from recipes.config import DataConfig, ParallelConfig, Recipe
from recipes.data.batches import BatchOptions
from recipes.data.corpus import open_corpus
from recipes.data.options import CorpusOptions
from recipes.data.selection import CorpusSamples, first_samples
from recipes.metrics.named import find_metrics
from recipes.training_config import TrainConfig

if TYPE_CHECKING:
    from bridge.generate.sampling import SamplingOptions

# Seconds between two lines about how far it is.
_EVERY_S = 5.0


@dataclass(frozen=True)
class EvaluationTask:
    """A model and its data. `assets`: the folder of its tokenizer; `rows`: of the first so many samples, 0: of all.

    `metrics` are of greedy answers, by `options`, `max_rows` at a time on a replica. `longest`: of the samples, in
    tokens. `progress`: a file that gets a line now and then.
    """

    model: ModelTask
    assets: Path
    data: CorpusOptions
    options: SamplingOptions
    longest: int
    metrics: tuple[str, ...] = ()
    rows: int = 0
    micro_batch_size: int = 4
    max_rows: int = MAX_ROWS
    progress: Path | None = None

    def samples(self) -> CorpusSamples:
        """The data, from the cache. Raises DataError."""
        return first_samples(open_corpus(self.data, self.assets), self.rows)

    def recipe(self) -> Recipe:
        """What training would call it."""
        layout = self.model.parallel
        sizes = {name: getattr(layout, name) for name in ("tp", "pp", "vpp", "ep", "etp", "cp", "sequence_parallel")}
        return Recipe(
            output="",
            data=DataConfig(packing=False, workers=self.data.workers),
            parallel=ParallelConfig(**sizes),
            train=TrainConfig(
                micro_batch_size=self.micro_batch_size,
                seq_length=self.longest + -self.longest % layout.row_multiple,
            ),
        )


@dataclass(frozen=True)
class Evaluated:
    """Means: `loss` and `token_accuracy` over all `tokens` with a label, `metrics` over the answers, by their names."""

    loss: float
    tokens: int
    token_accuracy: float
    metrics: dict[str, float]


def evaluate_model(task: EvaluationTask) -> Evaluated:
    """On every rank of the model's layout. Raises a BridgeError."""
    from functools import partial

    import torch.distributed as dist

    from bridge.generate.task import build_model, provider_of
    from recipes.data.questions import Questions
    from recipes.data.training import once
    from recipes.train.answers import AnswerMetrics
    from recipes.train.evaluate import evaluate
    from recipes.train.setup import BuiltModel
    from recipes.train.signals import StopSignal

    said_at = -math.inf

    def say(line: str) -> None:
        if task.progress is not None and dist.get_rank() == 0:
            with task.progress.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def now_and_then(line: str) -> None:
        nonlocal said_at
        if time.monotonic() - said_at > _EVERY_S:
            said_at = time.monotonic()
            say(line)

    samples, recipe = task.samples(), task.recipe()
    models, groups = build_model(task.model)
    run = BuiltModel(recipe, groups, provider_of(task.model), models, models)
    batch = BatchOptions(
        recipe.train.seq_length, task.micro_batch_size, groups.dp.rank(), groups.dp.size(), workers=recipe.data.workers
    )
    say(f"loss of {len(samples)} samples")
    never = StopSignal()
    values = evaluate(
        run,
        {"": partial(once, samples, batch)},
        never,
        accuracy=True,
        progress=lambda tokens: now_and_then(f"loss of {tokens} tokens"),
    )
    assert values is not None
    found: dict[str, float] = {}
    if task.metrics:
        metrics = AnswerMetrics(find_metrics(task.metrics, "--metrics"), {"": Questions(samples)}, task.options)
        measured = metrics.measure(
            run, never, say, lambda done: now_and_then(f"{done} of {len(samples)} answers"), task.max_rows
        )
        assert measured is not None
        found = measured
    return Evaluated(values["eval_loss"], int(values["eval_tokens"]), values["eval_token_accuracy"], found)
