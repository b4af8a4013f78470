"""What a run trains on and what it is evaluated on: data of its own, another split, or a part that is held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bridge.errors import UsageError
from recipes.config import DataConfig, Recipe
from recipes.data.corpus import Corpus
from recipes.data.options import CorpusOptions
from recipes.data.part import Samples, first, held_out
from recipes.data.sources import hub_split_names, is_hub_name, local_splits

# What the split that is not trained on is called, the likeliest first.
_EVALUATION_SPLITS = ("validation", "valid", "val", "dev", "eval", "evaluation", "test")


@dataclass(frozen=True)
class Opened:
    """The data of a run: `evaluation` by the names of the sets ("": the only one, without a name).

    `notes`: what has to be said of it.
    """

    train: Samples
    evaluation: Mapping[str, Samples] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def paths(value: Any) -> tuple[str, ...]:
    """The names in `data.path`, or in one set of `data.eval`."""
    return tuple(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else (str(value),)


def open_sets(recipe: Recipe, options: CorpusOptions, opened: Callable[[CorpusOptions], Corpus]) -> Opened:
    """The training data (of `options`), less what `data.val_fraction` holds out, and all that is evaluated on.

    `opened`: opens a corpus. Raises DataError and UsageError.
    """
    data, rows = recipe.data, recipe.train.eval_rows
    # Splits first: what is wrong with them is said before anything is tokenised.
    wanted = {name: (paths(value), _split(data, paths(value))) for name, value in _named(data).items()}
    train = opened(options)
    sets: dict[str, Samples] = {
        name: opened(replace(options, path=path, split=split)) for name, (path, split) in wanted.items()
    }
    notes = [
        f"evaluation{_called(name)} is on the data that is trained on ({', '.join(corpus.options.paths)})"
        for name, corpus in sets.items()
        if corpus.fingerprint == train.fingerprint
    ]
    rest: Samples = train
    if data.val_fraction:
        rest, sets["held_out" if sets else ""] = held_out(train, data.val_fraction)
    for name, corpus in sets.items():
        if rows and rows < len(corpus):
            sets[name] = first(corpus, rows)
            notes.append(f"evaluation{_called(name)} is of the first {rows} of {len(corpus)} samples (train.eval_rows)")
    return Opened(rest, sets, tuple(notes))


def _called(name: str) -> str:
    return f" {name}" if name else ""


def _named(data: DataConfig) -> dict[str, Any]:
    """What `data.eval` names, by the names of the sets."""
    if isinstance(data.eval, Mapping):
        for name, value in data.eval.items():
            if not value or isinstance(value, Mapping) or not str(name) or "/" in str(name):
                raise UsageError(
                    f"data.eval.{name}={value}: is a path (or a list of them) under a name without slashes"
                )
        sets = {str(name): value for name, value in data.eval.items()}
    elif data.eval:
        sets = {"": data.eval}
    else:
        sets = {"": data.path} if data.eval_split is not None else {}
    if data.val_fraction and "" in sets:
        raise UsageError("data.val_fraction beside data.eval or data.eval_split: name the set, data.eval.NAME=PATH")
    if data.val_fraction and "held_out" in sets:
        raise UsageError("data.eval.held_out: is the name of what data.val_fraction holds out")
    return sets


def _split(data: DataConfig, names: Sequence[str]) -> str:
    """The split that a set is read from; of what has no splits it does not count. Raises UsageError and DataError."""
    with_splits = [name for name in names if local_splits(name) or is_hub_name(name)]
    if data.eval_split is not None:
        if not with_splits:
            raise UsageError(f"data.eval_split={data.eval_split}: {', '.join(names)} has no splits")
        return data.eval_split
    chosen = set()
    for name in with_splits:
        known = local_splits(name) or hub_split_names(name, data.subset)
        candidates = [split for split in _EVALUATION_SPLITS if split in known and split != data.split]
        if not candidates:
            raise UsageError(
                f"{name}: has no split of its own for evaluation (there are {', '.join(known)}); set data.eval_split, "
                "or data.val_fraction to hold out a part of the training data"
            )
        chosen.add(candidates[0])
    if len(chosen) > 1:
        raise UsageError(f"{', '.join(names)}: different splits for evaluation ({', '.join(sorted(chosen))}); set "
                         "data.eval_split")  # fmt: skip
    return chosen.pop() if chosen else data.split
