"""Records that are tokens already: ids, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bridge.errors import DataError
from recipes.data.checks import is_list, kind_of

_IGNORE = -100
# Of tokens: 1 where they are learnt, as TRL and others call it.
LEARNT_MASKS = ("assistant_masks", "completion_mask", "loss_mask")


@dataclass(frozen=True)
class Tokens:
    """`ids` int32 [n], `supervised` bool [n]."""

    ids: np.ndarray
    supervised: np.ndarray


def parse_tokens(record: Mapping[str, Any], where: object) -> Tokens:
    """`input_ids`, with `labels` (not shifted, -100 where nothing is learnt) or masks; all is learnt without either.

    Padding, where `attention_mask` is 0, is taken out. Raises DataError.
    """
    ids = _integers(record["input_ids"], f"{where}: input_ids")
    if not len(ids) or ids.min() < 0 or ids.max() >= 2**31:
        raise DataError(f"{where}: input_ids: expected ids of tokens, found {_first_bad(ids)}")
    supervised = np.ones(len(ids), bool)
    for name in LEARNT_MASKS:
        if record.get(name) is not None:
            supervised &= _mask(record[name], len(ids), f"{where}: {name}")
    if record.get("labels") is not None:
        labels = _integers(record["labels"], f"{where}: labels")
        if len(labels) != len(ids):
            raise DataError(f"{where}: labels: {len(labels)} for {len(ids)} input_ids")
        other = np.flatnonzero((labels != _IGNORE) & (labels != ids))
        if len(other):
            raise DataError(
                f"{where}: labels[{other[0]}]: {labels[other[0]]} is neither -100 nor the token there, "
                f"{ids[other[0]]}; labels are not shifted here"
            )
        supervised &= labels != _IGNORE
    if record.get("attention_mask") is not None:
        real = _mask(record["attention_mask"], len(ids), f"{where}: attention_mask")
        ids, supervised = ids[real], supervised[real]
        if not len(ids):
            raise DataError(f"{where}: attention_mask: nothing but padding")
    return Tokens(ids.astype(np.int32), supervised)


def _integers(values: Any, at: str) -> np.ndarray:
    if isinstance(values, np.ndarray) and np.issubdtype(values.dtype, np.integer):
        return values.astype(np.int64)
    if not is_list(values) or not all(type(value) is int for value in values):
        raise DataError(f"{at}: expected a list of integers, found {kind_of(values)}")
    try:
        return np.asarray(values, np.int64)
    except OverflowError:
        raise DataError(f"{at}: a number that is too large") from None


def _mask(values: Any, length: int, at: str) -> np.ndarray:
    if not is_list(values) or len(values) != length or not all(value in (0, 1) for value in values):
        raise DataError(f"{at}: expected a 0 or 1 for each of the {length} input_ids")
    return np.asarray(values, bool)


def _first_bad(ids: np.ndarray) -> str:
    bad = ids[(ids < 0) | (ids >= 2**31)]
    return str(bad[0]) if len(bad) else "an empty list"
