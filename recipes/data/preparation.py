"""Data prepared before a run asks for it: what `train` does first, without the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bridge.errors import DataError, UsageError
from recipes.config import Recipe, load_recipe, resolve
from recipes.data import report
from recipes.data.blend import blend_of
from recipes.data.corpus import Corpus, open_corpus
from recipes.data.megatron import check_target, prefix_of, write
from recipes.data.options import CorpusOptions
from recipes.data.preference import of_its_kind
from recipes.data.record_sources import is_data
from recipes.data.selection import CorpusSamples, underlying_corpus
from recipes.data.training import corpora, corpus_options, model_folder, say


@dataclass(frozen=True)
class DataArguments:
    """A recipe, by its name, or else the names of data; with keys of recipes."""

    recipe: str | None
    paths: tuple[str, ...]
    overrides: tuple[str, ...]


def asked(arguments: Sequence[str], paths: Sequence[str]) -> DataArguments:
    """What arguments of a command name, beside the `paths` that are certainly data. Raises UsageError."""
    overrides = tuple(one for one in arguments if "=" in one and not Path(one).exists())
    names = [one for one in arguments if one not in overrides]
    if names and not is_data(names[0], bool(paths)):
        if len(names) > 1:
            raise UsageError(f"{names[1]}: beside a recipe come its keys, KEY=VALUE")
        if paths:
            raise UsageError("a recipe names data and model itself: write data.path=... and model.hf=...")
        return DataArguments(names[0], (), overrides)
    absent = [name for name in names if not Path(name).exists() and prefix_of(name) is None]
    if absent:
        beside = "; without a recipe, what stands beside --data is data too" if paths else ""
        raise UsageError(f"{absent[0]}: no such file{beside}")
    if not names and not paths:
        raise UsageError("name a recipe, or data: a file, or --data")
    return DataArguments(None, (*paths, *names), overrides)


def recipe_of(given: DataArguments, model: str | None, seq_length: int | None, workers: int | None) -> Recipe:
    """The recipe that is asked for, or one that says of the data what a recipe would. Raises UsageError."""
    keys = {"model.hf": model, "train.seq_length": seq_length, "data.workers": workers}
    overrides = [*given.overrides, *(f"{key}={value}" for key, value in keys.items() if value is not None)]
    if given.recipe is not None:
        return load_recipe(given.recipe, overrides)
    recipe = resolve({"output": ".", "data": {"path": list(given.paths)}}, overrides, "data")
    if recipe.model.hf is None and recipe.model.megatron is None:
        raise UsageError("--model: tokens are those of a model: name an HF folder or hub id")
    return recipe


def prepare(recipe: Recipe, *, of_unknown_kind: bool) -> tuple[Mapping[str, CorpusSamples], tuple[str, ...]]:
    """What a run trains on and is evaluated on, by the names of the sets, all of it prepared, and what there is to say.

    `of_unknown_kind`: it is data that no recipe names: its first record shows whether it is preferences. Raises
    DataError and UsageError.
    """
    if of_unknown_kind:
        return {"train": opened(recipe, of_its_kind(corpus_options(recipe)))}, ()
    every = corpora(recipe)
    sets = {f"eval/{name}" if name else "eval": samples for name, samples in every.evaluation.items()}
    sources = blend_of(every.train).sources
    return {**{f"train/{one.name}" if one.name else "train": one.samples for one in sources}, **sets}, every.notes


# What is written for Megatron is whole: its readers cut it.
_WHOLE = 2**31 - 1


def targets(recipe: Recipe, out: str, seq_length: int | None) -> Recipe:
    """The recipe for what `to_megatron` writes to a prefix. Raises UsageError."""
    check_target(Path(out))
    if seq_length is not None:
        raise UsageError("--seq-length: documents are written whole; whoever reads them cuts them")
    if recipe.data.val_fraction:
        raise UsageError(
            "data.val_fraction: holds samples out for a run; leave it to the run that reads what is written"
        )
    return replace(recipe, train=replace(recipe.train, seq_length=_WHOLE))


def to_megatron(sets: Mapping[str, CorpusSamples], out: str) -> tuple[dict[str, Any], list[str]]:
    """Write every set, `train` to the prefix `out`, others with their names behind it; what was written, and what there
    is to say. Raises DataError and UsageError."""
    written: dict[str, Any] = {}
    said: list[str] = []
    for name, samples in sets.items():
        prefix = Path(out if name == "train" else f"{out}_{name.replace('/', '_')}")
        check_target(prefix)
        if not isinstance(samples, Corpus) or samples.has_media or samples.options.together > 1:
            raise DataError(f"{prefix}: Megatron's format holds tokens alone: no media, no pairs, no part of a file")
        write(prefix, samples.folder / "ids.bin", samples.lengths)
        counts = samples.statistics
        written[name] = {"prefix": str(prefix), "sequences": len(samples), "tokens": counts.tokens}
        said.append(f"wrote {prefix}.bin and .idx: {len(samples)} sequences, {counts.tokens} tokens")
        unlearnt = counts.tokens - counts.supervised - len(samples)
        if unlearnt > 0:
            said.append(
                f"warning: {unlearnt} tokens that are not learnt of these records (what is asked) are tokens like "
                "others there: the format does not say what is learnt, and a run on it learns all of them"
            )
    return written, said


def opened(recipe: Recipe, options: CorpusOptions) -> Corpus:
    """One corpus for the model of a recipe. Raises DataError and UsageError."""
    progress = report.ProgressLines(say)
    return open_corpus(options, model_folder(recipe), progress=progress.read, notify=progress.line)


def to_json(sets: Mapping[str, CorpusSamples]) -> dict[str, Any]:
    """What there is now, by the names of the sets."""
    return {"sets": {name: _facts(samples) for name, samples in sets.items()}}


def _facts(samples: CorpusSamples) -> dict[str, Any]:
    corpus = underlying_corpus(samples)
    return {
        **report.facts(corpus.statistics, corpus.options, corpus.files),
        "samples": len(samples),
        "tokens": int(samples.lengths.sum()),
        "cache": str(corpus.folder),
    }


def lines(sets: Mapping[str, CorpusSamples]) -> list[str]:
    """The same for people."""
    said: list[str] = []
    for name, samples in sets.items():
        corpus = underlying_corpus(samples)
        known = (corpus.statistics, corpus.options)
        said += [f"{name}: {len(samples)} samples, {int(samples.lengths.sum())} tokens: {corpus.folder}"]
        said += report.lines(*known, corpus.files)
        said += report.warnings(*known)
    return said
