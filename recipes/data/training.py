"""The data of a recipe, as the training loop takes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from omegaconf import ListConfig
from torch import Tensor

from bridge.convert.manifest import MegatronFolder
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.hf.hub import resolve
from recipes.check import check_data
from recipes.config import Recipe
from recipes.data.batches import Batches, BatchOptions
from recipes.data.corpus import Corpus, open_corpus
from recipes.data.options import CorpusOptions, Supervise
from recipes.train.data import Streams


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


def streams(
    recipe: Recipe,
    geometry: Geometry,
    dp_rank: int,
    dp_size: int,
    opened: tuple[Corpus, Corpus | None] | None = None,
) -> Streams:
    """Batch what `data.path` names: `opened`, or opened here. Raises DataError and UsageError."""
    data, train = recipe.data, recipe.train
    corpus, held_out = opened or corpora(recipe)
    batch = BatchOptions(
        train.seq_length,
        train.micro_batch_size,
        dp_rank,
        dp_size,
        seed=train.seed,
        packing=data.packing,
        workers=data.workers,
    )
    if held_out is None:
        return Streams(Batches(corpus, batch))

    def evaluation() -> Iterator[dict[str, Tensor]]:
        with Batches(held_out, replace(batch, shuffle=False, packing=False, epochs=1)) as batches:
            yield from batches

    return Streams(Batches(corpus, batch), evaluation)


def _paths(value: Any) -> str | tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list | tuple | ListConfig) else str(value)
