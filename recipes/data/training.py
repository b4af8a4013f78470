"""The data of a recipe, as the training loop takes it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor

from bridge.convert.manifest import MegatronFolder
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.hf.hub import resolve
from recipes.check import check_data
from recipes.config import Recipe
from recipes.data import blend_report, report
from recipes.data.batches import Batches, BatchOptions, Taught
from recipes.data.blend import Blend, Samples, blend_of
from recipes.data.corpus import Corpus, open_corpus
from recipes.data.epochs import with_steps
from recipes.data.evaluation import Opened, open_sets
from recipes.data.formats import FormatOptions
from recipes.data.options import CorpusOptions, Supervise
from recipes.data.preference import LABELLED, PAIRS, SAMPLES
from recipes.data.questions import Questions, check_questions
from recipes.data.selection import underlying_corpus
from recipes.environment import rank_from_environment
from recipes.losses.names import ANSWERS, KTO, loss_names
from recipes.metrics.named import find_metrics
from recipes.sources import all_paths
from recipes.train.data import AnswerBatches, DataFactory, Streams


def model_folder(recipe: Recipe) -> str:
    """Where a recipe's tokenizer, processor and chat template are. Raises UsageError where it names no model."""
    if recipe.model.hf is None and recipe.model.megatron is None:
        raise UsageError("set model.hf or model.megatron")
    if recipe.model.hf is not None:
        return str(resolve(recipe.model.hf))
    return str(MegatronFolder.open(str(recipe.model.megatron)).hf)


def corpus_options(recipe: Recipe) -> CorpusOptions:
    """What a recipe says of all its training data. Raises UsageError."""
    check_data(recipe)
    data, records = recipe.data, records_of(recipe)
    turns = data.supervise_turns if records == SAMPLES else "last"
    return CorpusOptions(
        all_paths(data),
        recipe.train.seq_length,
        split=data.split,
        subset=data.subset,
        supervise=Supervise(turns, data.supervise_thinking, data.supervise_tool_calls),
        on_error=data.on_error,
        overlong=data.overlong,
        allow_urls=data.allow_urls,
        media_root=data.media_root,
        chat_template=data.chat_template,
        template_kwargs=dict(data.template_kwargs),
        generation_prefix=data.generation_prefix,
        records=records,
        one_row=records == PAIRS and data.packing,
        cache=data.cache,
        workers=data.workers,
        format=FormatOptions(data.format, dict(data.columns), data.function),
    )


def corpora(recipe: Recipe) -> Opened:
    """Open, and tokenise where that was not done before, what a recipe trains on and is evaluated on.

    Raises DataError and UsageError.
    """
    folder = model_folder(recipe)

    def opened(options: CorpusOptions) -> Corpus:
        say(f"reading data: {', '.join(options.paths)}")
        progress = report.ProgressLines(say)
        return open_corpus(options, folder, progress=progress.read, notify=progress.line, asked_by=recipe.output)

    return open_sets(recipe, corpus_options(recipe), opened)


def batch_options(recipe: Recipe, dp_rank: int = 0, dp_size: int = 1) -> BatchOptions:
    """How a recipe makes batches of its samples."""
    data, train = recipe.data, recipe.train
    return BatchOptions(
        train.seq_length,
        train.micro_batch_size,
        dp_rank,
        dp_size,
        seed=train.seed,
        shuffle=data.shuffle,
        packing=data.packing,
        workers=data.workers,
        on_change=data.on_change,
        prompts=loss_names(recipe.preference) == ("orpo",),
        mismatched=loss_names(recipe.preference) == (KTO,),
        label_ids=recipe.distill.cache,
    )


def records_of(recipe: Recipe) -> str:
    """The kind of records that a recipe's loss takes."""
    names = loss_names(recipe.preference)
    if not names:
        return SAMPLES
    return LABELLED if names[0] in ANSWERS else PAIRS


def prepared(recipe: Recipe) -> tuple[Recipe, DataFactory]:
    """Open the data of a recipe: how many steps it has, if it says epochs, and the data for the loop.

    Raises DataError and UsageError.
    """
    opened = corpora(recipe)
    if recipe.eval.metrics or isinstance(recipe.train.samples, int):
        metrics = find_metrics(recipe.eval.metrics, "eval.metrics")
        count = recipe.eval.metric_rows if metrics else recipe.train.samples
        for samples in opened.evaluation.values():
            check_questions(metrics, Questions(samples, count), "eval.metrics")
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
    ref_logps: dict[str, np.ndarray] = {}
    taught: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    batches = Batches(opened.train, batch, say, ref_logps, taught)
    evaluation = {name: partial(once, corpus, batch, ref_logps, taught) for name, corpus in opened.evaluation.items()}
    sources = blend_of(opened.train).sources
    asked = records_of(recipe) != SAMPLES or recipe.distill.cache
    sets = (*(each.samples for each in sources), *opened.evaluation.values()) if asked else ()
    answers = tuple(AnswerBatches(samples, partial(once, samples, batch)) for samples in sets)
    found = [_said(underlying_corpus(each.samples)) for each in sources]
    facts = found[0][0] if len(found) == 1 else {}
    notes = [line for _, said in found for line in said]
    if isinstance(opened.train, Blend):
        used = blend_report.uses(sources, batches.order, rows_of_run(recipe))
        notes = [*notes, *blend_report.lines(used)]
        facts = {**facts, "sources": blend_report.to_json(used)}
    facts = {
        **facts,
        "trained_on": len(opened.train),
        "evaluated_on": {name: len(corpus) for name, corpus in opened.evaluation.items()},
        "packing": batch.packing,
        "rows": None if batches.order.weighted else batches.rows(0),
    }
    return Streams(
        batches,
        evaluation,
        (*notes, *opened.notes),
        facts,
        opened.evaluation,
        answers,
        ref_logps,
        opened.train,
        taught,
        tuple(each.name for each in sources) if len(sources) > 1 else (),
    )


def _said(corpus: Corpus) -> tuple[dict[str, Any], list[str]]:
    """What became of the records of a corpus, for JSON and in words."""
    known = (corpus.statistics, corpus.options, corpus.files)
    said = [*report.lines(*known), *report.warnings(*known[:2])]
    return {**report.facts(*known), "cache": str(corpus.folder)}, said


def rows_of_run(recipe: Recipe) -> int:
    """How many rows of the data the steps of a recipe take: of answers that are sampled, prompts."""
    grpo, rows = recipe.grpo, recipe.train.steps * recipe.train.global_batch_size
    return -(-rows // (grpo.num_generations * grpo.num_iterations)) if grpo.rewards else rows


def once(
    samples: Samples,
    batch: BatchOptions,
    ref_logps: Mapping[str, np.ndarray] = MappingProxyType({}),
    taught: Taught = MappingProxyType({}),
) -> Iterator[dict[str, Tensor]]:
    """In order and once: that ends with rows without labels, as many microbatches on every rank."""
    with Batches(samples, replace(batch, shuffle=False, epochs=1), ref_logps=ref_logps, taught=taught) as batches:
        yield from batches
