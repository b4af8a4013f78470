"""What ranks run for the evaluation tests: one model, its loss over the same rows in every way to batch them."""

from __future__ import annotations

import json
from pathlib import Path
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
    from recipes.train.data import open_streams
    from recipes.train.evaluate import evaluate
    from recipes.train.setup import build
    from recipes.train.signals import StopSignal

    run = build(resolve(said, layout), load=True)
    values = []
    for keys in batches:
        recipe = resolve(said, [*layout, *keys])
        streams = open_streams(recipe, run.bridge.geometry, run.groups.dp.rank(), run.groups.dp.size())
        found = evaluate(run, streams, StopSignal())
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
    total, tokens = 0.0, 0
    for corpus in corpora(resolve(said)).evaluation.values():
        for number in range(len(corpus)):
            sample = corpus[number]
            ids = torch.from_numpy(sample.ids).long()[None]
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
            learnt = torch.from_numpy(sample.supervised)[1:]
            total, tokens = total + float(losses[learnt].sum()), tokens + int(learnt.sum())
    return {"eval_loss": total / tokens, "eval_tokens": float(tokens)}
