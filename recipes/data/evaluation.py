"""What a run trains on and what it is evaluated on: data of its own, another split, or a part that is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bridge.errors import UsageError
from recipes.config import DataConfig, Recipe
from recipes.data.blend import Blend, BlendSource, Samples
from recipes.data.corpus import Corpus
from recipes.data.options import CorpusOptions
from recipes.data.order import ALL
from recipes.data.record_sources import hub_split_names, is_hub_name, local_splits
from recipes.data.selection import CorpusSamples, first_samples, held_out, underlying_corpus
from recipes.data.source_keys import SourceOptions, source_options
from recipes.sources import left_out, paths

# What the split that is not trained on is called, the likeliest first.
_EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "evaluation", "test")


@dataclass(frozen=True)
class Opened:
    """The data of a run: `evaluation` by the names of the sets ("": the only one, without a name).

    `notes`: what has to be said of it.
    """

    train: Samples
    evaluation: Mapping[str, CorpusSamples] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_sets(recipe: Recipe, options: CorpusOptions, opened: Callable[[CorpusOptions], Corpus]) -> Opened:
    """The training data (of `options`), less what `data.val_fraction` holds out, and all that is evaluated on.

    `opened`: opens a corpus. Raises DataError and UsageError.
    """
    data = recipe.data
    # Splits first: what is wrong with them is said before anything is tokenised.
    wanted, said = _wanted(data, options), source_options(data, options)
    notes = [f"source {name} is left out (weight 0)" for name in left_out(data)]
    train = [first_samples(opened(one.options), one.max_samples) for one in said]
    for one, samples in zip(said, train, strict=True):
        if len(samples) < len(underlying_corpus(samples)):
            there = len(underlying_corpus(samples)) // one.options.together
            notes.append(f"source {one.name} is of its first {one.max_samples} of {there} samples (max_samples)")
    sets: dict[str, CorpusSamples] = {name: opened(one) for name, one in wanted.items()}
    trained = {underlying_corpus(samples).fingerprint for samples in train}
    notes += [
        f"evaluation{_called(name)} is on the data that is trained on ({', '.join(corpus.options.paths)})"
        for name, corpus in sets.items()
        if corpus.fingerprint in trained
    ]
    if data.val_fraction:
        parts = [held_out(samples, data.val_fraction) for samples in train]
        for one, (rest, held) in zip(said, parts, strict=True):
            sets[one.name or ("held_out" if sets else "")] = held
            taken, there = (size // one.options.together for size in (len(held), len(held) + len(rest)))
            notes.append(
                f"{taken} of {there} samples{f' of {one.name}' if one.name else ''} are held out "
                f"and evaluated on, chosen by their content (data.val_fraction={data.val_fraction:g})"
            )
        train = [rest for rest, _ in parts]
    return Opened(_blended(said, train), _limited(sets, recipe.train.eval_rows, notes), tuple(notes))


def _limited(sets: Mapping[str, CorpusSamples], rows: int, notes: list[str]) -> dict[str, CorpusSamples]:
    """The first so many samples of each set (0: all), which is noted."""
    for name, corpus in sets.items():
        there = len(corpus) // corpus.options.together
        if rows and rows < there:
            notes.append(f"evaluation{_called(name)} is of the first {rows} of {there} samples (train.eval_rows)")
    return {name: first_samples(corpus, rows) for name, corpus in sets.items()}


def _blended(said: Sequence[SourceOptions], train: Sequence[CorpusSamples]) -> Samples:
    """What is trained on. Raises UsageError that names a source of which more is asked for than there is."""
    if len(said) == 1 and said[0].share == ALL:
        return train[0]
    for one, samples in zip(said, train, strict=True):
        there, wanted, repeat = int(samples.lengths.sum()), one.share.tokens, one.share.repeat
        if wanted is not None and wanted > repeat * there:
            times = f"{repeat} times its" if repeat > 1 else "its"
            raise UsageError(
                f"{one.key}: tokens={wanted} are more than {times} {there} tokens; repeat={-(-wanted // there)} sees "
                "them again"
            )
    return Blend(
        [BlendSource(one.name, samples, one.share, one.number) for one, samples in zip(said, train, strict=True)]
    )


def _called(name: str) -> str:
    return f" {name}" if name else ""


def _wanted(data: DataConfig, options: CorpusOptions) -> dict[str, CorpusOptions]:
    """What is opened to be evaluated on, by the names of the sets. Raises UsageError and DataError."""
    said = source_options(data, options)
    sets = {name: replace(options, path=paths(value)) for name, value in _named(data).items()}
    if not sets and data.eval_split is not None:
        sets = {one.name: replace(one.options, path=one.options.paths) for one in said}
    if data.val_fraction and sets and not isinstance(data.eval, Mapping):
        raise UsageError("data.val_fraction beside data.eval or data.eval_split: name the set, data.eval.NAME=PATH")
    held = {one.name or "held_out" for one in said} if data.val_fraction else set()
    if taken := sorted(held & sets.keys()):
        raise UsageError(f"data.eval.{taken[0]}: is the name of what data.val_fraction holds out")
    return {name: replace(set_options, split=_split(data, set_options)) for name, set_options in sets.items()}


def _named(data: DataConfig) -> dict[str, Any]:
    """What `data.eval` names, by the names of the sets."""
    if not isinstance(data.eval, Mapping):
        return {"": data.eval} if data.eval else {}
    for name, value in data.eval.items():
        if not value or isinstance(value, Mapping) or not str(name) or "/" in str(name):
            raise UsageError(f"data.eval.{name}={value}: is a path (or a list of them) under a name without slashes")
    return {str(name): value for name, value in data.eval.items()}


def _split(data: DataConfig, options: CorpusOptions) -> str:
    """The split that a set is read from; of what has no splits it does not count. Raises UsageError and DataError."""
    names = options.paths
    with_splits = [name for name in names if local_splits(name) or is_hub_name(name)]
    if data.eval_split is not None:
        if not with_splits:
            raise UsageError(f"data.eval_split={data.eval_split}: {', '.join(names)} has no splits")
        return data.eval_split
    chosen = set()
    for name in with_splits:
        known = local_splits(name) or hub_split_names(name, options.subset)
        candidates = [split for split in _EVALUATION_SPLITS if split in known and split != options.split]
        if not candidates:
            raise UsageError(
                f"{name}: has no split of its own for evaluation (there are {', '.join(known)}); set data.eval_split, "
                "or data.val_fraction to hold out a part of the training data"
            )
        chosen.add(candidates[0])
    if len(chosen) > 1:
        raise UsageError(
            f"{', '.join(names)}: different splits for evaluation ({', '.join(sorted(chosen))}); set data.eval_split"
        )
    return chosen.pop() if chosen else options.split
