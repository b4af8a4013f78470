"""The data of a recipe, as the training loop takes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from omegaconf import ListConfig
from torch import Tensor

from bridge.convert.manifest import MegatronFolder
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.hf.hub import resolve
from recipes.check import check_data
from recipes.config import Recipe, rank_from_environment
from recipes.data.batches import Batches, BatchOptions
from recipes.data.corpus import Corpus, open_corpus
from recipes.data.epochs import with_steps
from recipes.data.options import CorpusOptions, Supervise
from recipes.train.data import DataFactory, Streams


def model_folder(recipe: Recipe) -> str:
    """Where a recipe's tokenizer, processor and chat template are. Raises UsageError where it names no model."""
    if recipe.model.hf is None and recipe.model.megatron is None:
        raise UsageError("set model.hf or model.megatron")
    if recipe.model.hf is not None:
        return str(resolve(recipe.model.hf))
    return str(MegatronFolder.open(str(recipe.model.megatron)).hf)


def corpus_options(recipe: Recipe) -> CorpusOptions:
    """What a recipe says of its training data. Raises UsageError."""
    check_data(recipe)
    data = recipe.data
    return CorpusOptions(
        _paths(data.path),
        recipe.train.seq_length,
        split=data.split,
        subset=data.subset,
        supervise=Supervise(data.supervise_turns, data.supervise_thinking, data.supervise_tool_calls),
        on_error=data.on_error,
        overlong=data.overlong,
        allow_urls=data.allow_urls,
        media_root=data.media_root,
        chat_template=data.chat_template,
        template_kwargs=dict(data.template_kwargs),
        generation_prefix=data.generation_prefix,
        cache=data.cache,
        workers=data.workers,
    )


def corpora(recipe: Recipe) -> tuple[Corpus, Corpus | None]:
    """Open, and tokenise where that was not done before, what `data.path` and `data.eval_path` name.

    Raises DataError and UsageError.
    """
    folder, options, held_out = model_folder(recipe), corpus_options(recipe), recipe.data.eval_path
    train = open_corpus(options, folder)
    return train, None if held_out is None else open_corpus(replace(options, path=_paths(held_out)), folder)


def batch_options(recipe: Recipe, dp_rank: int = 0, dp_size: int = 1) -> BatchOptions:
    """How a recipe makes batches of its samples."""
    data, train = recipe.data, recipe.train
    return BatchOptions(
        train.seq_length,
        train.micro_batch_size,
        dp_rank,
        dp_size,
        seed=train.seed,
        packing=data.packing,
        workers=data.workers,
        on_change=data.on_change,
    )


def prepared(recipe: Recipe) -> tuple[Recipe, DataFactory]:
    """Open the data of a recipe: how many steps it has, if it says epochs, and the data for the loop.

    Raises DataError and UsageError.
    """
    opened = corpora(recipe)
    settled = with_steps(recipe, Batches(opened[0], batch_options(recipe)))
    return settled, partial(streams, opened=opened)


def say(line: str) -> None:
    """A line for who watches, once for all ranks."""
    if rank_from_environment() == 0:
        print(line, file=sys.stderr, flush=True)


def streams(
    recipe: Recipe,
    geometry: Geometry,
    dp_rank: int,
    dp_size: int,
    opened: tuple[Corpus, Corpus | None] | None = None,
) -> Streams:
    """Batch what `data.path` names: `opened`, or opened here. Raises DataError and UsageError."""
    corpus, held_out = opened or corpora(recipe)
    batch = batch_options(recipe, dp_rank, dp_size)
    if held_out is None:
        return Streams(Batches(corpus, batch, say))

    def evaluation() -> Iterator[dict[str, Tensor]]:
        with Batches(held_out, replace(batch, shuffle=False, packing=False, epochs=1)) as batches:
            yield from batches

    return Streams(Batches(corpus, batch, say), evaluation)


def _paths(value: Any) -> str | tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple | ListConfig) else str(value)
