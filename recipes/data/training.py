"""The data of a recipe, as the training loop takes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from bridge.convert.manifest import MegatronFolder
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.hf.hub import resolve
from recipes.check import check_data
from recipes.config import Recipe, rank_from_environment
from recipes.data.batches import Batches, BatchOptions
from recipes.data.corpus import open_corpus
from recipes.data.epochs import with_steps
from recipes.data.evaluation import Opened, open_sets, paths
from recipes.data.options import CorpusOptions, Supervise
from recipes.data.part import Samples
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
        paths(data.path),
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


def corpora(recipe: Recipe) -> Opened:
    """Open, and tokenise where that was not done before, what a recipe trains on and is evaluated on.

    Raises DataError and UsageError.
    """
    return open_sets(recipe, corpus_options(recipe), partial(open_corpus, model=model_folder(recipe)))


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
    settled = with_steps(recipe, Batches(opened.train, batch_options(recipe)))
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
    opened: Opened | None = None,
) -> Streams:
    """Batch what `data.path` names: `opened`, or opened here. Raises DataError and UsageError."""
    opened = opened or corpora(recipe)
    batch = batch_options(recipe, dp_rank, dp_size)
    # In order and once: `epochs` ends with rows without labels, as many microbatches on every rank.
    once = replace(batch, shuffle=False, epochs=1)

    def begin(corpus: Samples) -> Iterator[dict[str, Tensor]]:
        with Batches(corpus, once) as batches:
            yield from batches

    evaluation = {name: partial(begin, corpus) for name, corpus in opened.evaluation.items()}
    return Streams(Batches(opened.train, batch, say), evaluation, opened.notes)
