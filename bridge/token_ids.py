"""Token ids against the tables that they are looked up in: whatever gives ids to a model, here they are held to it.

torch raises for an id behind its table. A table split over tensor-parallel ranks gives zeros for one that no rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bridge.errors import CheckpointError, UsageError
from bridge.geometry import Geometry
from bridge.hf.json_file import read_object

IGNORE = -100  # the label of a position that has no loss, as in transformers


@dataclass(frozen=True)
class EmbeddingTable:
    """A table with a row for every id below `rows`; `field` of the config says how many."""

    name: str
    rows: int
    field: str


def embedding_tables(geometry: Geometry) -> tuple[EmbeddingTable, ...]:
    """The tables that every text token is looked up in; the first one's rows are also those of the head."""
    tables = [EmbeddingTable("embed_tokens", geometry.vocab_size, "vocab_size")]
    if geometry.ple is not None:
        name, field = "embed_tokens_per_layer", "vocab_size_per_layer_input"
        tables.append(EmbeddingTable(name, geometry.ple.vocab_size, field))
    return tuple(tables)


def check_ids(
    ids: np.ndarray, geometry: Geometry, where: object, token: Callable[[int], str | None] = lambda number: None
) -> None:
    """Refuse `ids` (integers, any shape) that a table of the model has no row for.

    Placeholders are no text: what they stand for is put over their embeddings. `token` names an id where a tokenizer
    is at hand. Raises UsageError: `where`, the id, the table, and how to give it rows.
    """
    for table in embedding_tables(geometry):
        _check(ids, table, geometry, where, token)


def check_labels(labels: np.ndarray, geometry: Geometry, where: object) -> None:
    """Refuse labels (`IGNORE` = none) that the head has no row for. Raises UsageError, as `check_ids`."""
    _check(labels[labels != IGNORE], embedding_tables(geometry)[0], geometry, where, lambda number: None)


def _check(
    ids: np.ndarray,
    table: EmbeddingTable,
    geometry: Geometry,
    where: object,
    token: Callable[[int], str | None],
) -> None:
    if not ids.size or (int(ids.min()) >= 0 and int(ids.max()) < table.rows):
        return
    outside = np.unique(ids[(ids < 0) | (ids >= table.rows)])
    unknown = [number for number in outside.tolist() if number not in geometry.placeholder_ids]
    if unknown:
        raise UsageError(f"{where}: {_no_row(unknown[0], token(unknown[0]), table)}")


def _no_row(number: int, token: str | None, table: EmbeddingTable) -> str:
    named = f"token {token!r} (id {number})" if token is not None else f"token id {number}"
    if number < 0:
        return f"{named} is negative: no token"
    return (
        f"{named} has no row in {table.name} ({table.rows} rows, {table.field} of config.json): give the tables rows "
        f"for all tokens (transformers: model.resize_token_embeddings({number + 1}) or more), or take the tokenizer "
        "that belongs to this model"
    )


def tokens_without_rows(folder: Path, geometry: Geometry) -> tuple[tuple[int, str, str], ...]:
    """(id, token, table) of the tokenizer in `folder` that a table of the model has no row for, by id; the first table.

    Nothing where the folder has no readable `tokenizer.json`: what is wrong with that is said where it is used.
    """
    found: dict[int, tuple[int, str, str]] = {}
    tokens = dict(_tokens(folder))
    for table in embedding_tables(geometry):
        for number, token in tokens.items():
            if number >= table.rows and number not in geometry.placeholder_ids:
                found.setdefault(number, (number, token, table.name))
    return tuple(found[number] for number in sorted(found))


def _tokens(folder: Path) -> Iterable[tuple[int, str]]:
    try:
        whole = read_object(folder / "tokenizer.json")
    except CheckpointError:
        return
    model = whole.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        yield from ((number, token) for token, number in vocabulary.items() if type(number) is int)
    added = whole.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, Mapping) and type(entry.get("id")) is int:
            yield entry["id"], str(entry.get("content"))
