"""What ranks run for the evaluation tests: one model, its loss over the same rows in every way to batch them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

LENGTH, GLOBAL_BATCH = 96, 48
WORDS = ("the", "cat", "in", "an", "old", "house", "was", "at", "the", "door", "and", "what", "my", "dog", "heard")


def write_chats(path: Path, count: int, seed: int) -> Path:
    """Conversations of very different lengths, all of which fit into a row."""
    generator = torch.Generator().manual_seed(seed)

    def words(most: int) -> str:
        length = int(torch.randint(1, most, (1,), generator=generator))
        return " ".join(WORDS[int(i)] for i in torch.randint(0, len(WORDS), (length,), generator=generator))

    rows = [
        {"messages": [{"role": "user", "content": words(6)}, {"role": "assistant", "content": words(14)}]}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def recipe(toy: Path, data: Path, cache: Path) -> dict[str, Any]:
    return {
        "output": "nowhere",
        "model": {"hf": str(toy), "dtype": "float32"},
        "data": {"path": str(data), "eval": str(data), "cache": str(cache)},
        "train": {"steps": 1, "global_batch_size": GLOBAL_BATCH, "seq_length": LENGTH, "eval_every": 1},
    }


def evaluations(said: dict[str, Any], layout: list[str], batches: list[list[str]]) -> list[dict[str, float]]:
    """What is logged of the untrained model in a layout, for each of these keys of batches and sets. On every rank."""
    from recipes.config import resolve
    from recipes.data.training import streams as open_streams
    from recipes.train.evaluate import evaluate
    from recipes.train.setup import build
    from recipes.train.signals import StopSignal

    run = build(resolve(said, layout), load=True)
    values = []
    for keys in batches:
        recipe = resolve(said, [*layout, *keys])
        streams = open_streams(recipe, run.bridge.geometry, run.groups.dp.rank(), run.groups.dp.size())
        found = evaluate(run, streams.evaluation, StopSignal())
        assert found is not None
        values.append(found)
    return values


def reference(said: dict[str, Any]) -> dict[str, float]:
    """The same by definition: transformers on one row at a time, every token's loss, float64 sums."""
    from bridge.geometry import Geometry
    from bridge.verify.reference import load_hf
    from recipes.config import resolve
    from recipes.data.training import corpora

    model = load_hf(Path(said["model"]["hf"]), Geometry.from_folder(said["model"]["hf"]), torch.float32).eval()
    total, tokens, right = 0.0, 0, 0
    for corpus in corpora(resolve(said)).evaluation.values():
        for number in range(len(corpus)):
            sample = corpus[number]
            ids = torch.from_numpy(sample.ids).long()[None]
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            learnt = torch.from_numpy(sample.supervised)[1:]
            total, tokens = total + float(losses[learnt].sum()), tokens + int(learnt.sum())
            right += int((logits.argmax(-1) == ids[0, 1:])[learnt].sum())
    return {"eval_loss": total / tokens, "eval_tokens": float(tokens), "eval_token_accuracy": right / tokens}


@dataclass(frozen=True)
class Told:
    """How a run ended, and what it said to who watches."""

    exit_code: int
    step: int
    said: list[str]


def train_scripted(said: dict[str, Any], overrides: list[str], script: dict[int, float]) -> Told:
    """Train the toy of `training_kit`, where the evaluation of a step gives what `script` says.

    On a clock by which an evaluation takes eleven days. Runs on every rank.
    """
    from recipes.train import loop, meter

    offset = 0.0
    real_evaluate, real_clock = loop.evaluate, meter.time.perf_counter

    def scripted(*given: Any) -> dict[str, float]:
        nonlocal offset
        offset += 1e6
        return {"eval_loss": script[one[0].progress.step], "eval_tokens": 1.0}

    one: list[Any] = []
    start = loop._Loop.__init__

    def noting(self: Any, *given: Any) -> None:
        start(self, *given)
        one.append(self)

    loop.evaluate, loop._Loop.__init__ = scripted, noting  # type: ignore[assignment, method-assign]
    meter.time = SimpleNamespace(perf_counter=lambda: real_clock() + offset)  # type: ignore[assignment]
    try:
        return train_told(said, overrides)
    finally:
        loop.evaluate, loop._Loop.__init__ = real_evaluate, start  # type: ignore[method-assign]
        meter.time = time  # type: ignore[assignment]


def train_told(said: dict[str, Any], overrides: list[str], data: Any = None) -> Told:
    """Train, and note what is said. Runs on every rank."""
    from recipes.config import resolve
    from recipes.train.log import Log
    from recipes.train.loop import train

    from .training_kit import toy_streams

    words: list[str] = []
    say = Log.say

    def noting(self: Log, text: str) -> None:
        words.append(text)
        say(self, text)

    Log.say = noting  # type: ignore[method-assign]
    try:
        outcome = train(resolve(said, overrides), data or toy_streams())
    finally:
        Log.say = say  # type: ignore[method-assign]
    return Told(outcome.exit_code, outcome.step, words)


def train_signalled(said: dict[str, Any], overrides: list[str], number: int, at: int) -> tuple[Told, int]:
    """Train, and be signalled on rank 0 when the first evaluation asks for microbatch `at`; how many it took in all."""
    from dataclasses import replace

    from .training_kit import toy_streams

    taken = 0

    def data(*given: Any) -> Any:
        streams = toy_streams()(*given)

        def evaluation() -> Iterator[dict[str, torch.Tensor]]:
            nonlocal taken
            # The same two microbatches for as long as nobody stops it: 400 of them.
            batches = list(streams.evaluation[""]())
            for batch in batches * 200:
                taken += 1
                if taken == at and torch.distributed.get_rank() == 0:
                    os.kill(os.getpid(), number)
                yield batch

        return replace(streams, evaluation={"": evaluation})

    return train_told(said, overrides, data), taken


def squares(toy: str, seed: int) -> tuple[float, float]:
    """(cross entropy, squared log-sum-exp), means over the first step of `training_kit`, as transformers has them."""
    from bridge.geometry import Geometry
    from bridge.verify.reference import load_hf

    from .training_kit import GLOBAL_BATCH, collate

    geometry = Geometry.from_folder(toy)
    batch = collate(geometry, seed, range(GLOBAL_BATCH))
    names = ("input_ids", "attention_mask", "position_ids")
    with torch.no_grad():
        model = load_hf(Path(toy), geometry, torch.float32).eval()
        logits = model(**{name: batch[name] for name in names}, use_cache=False).logits.double()
    kept = batch["labels"] != -100
    entropy = torch.nn.functional.cross_entropy(logits[kept], batch["labels"][kept])
    return float(entropy), float(logits[kept].logsumexp(-1).square().mean())
