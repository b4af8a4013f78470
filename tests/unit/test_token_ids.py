"""Ids that a table of the model has no row for: refused by name, wherever they come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.inspection import inspect_folder
from bridge.token_ids import check_ids, check_labels, tokens_without_rows
from bridge.toy import write_toy
from bridge.toy.config import toy_config
from tests.unit.data_helpers import corpus_of, model_folder


def geometry(variant: str = "e2b", **sizes: int) -> Geometry:
    return Geometry.from_dict(toy_config(variant, **sizes).written)


def test_ids_are_held_against_every_table() -> None:
    model = geometry(vocab_size=520, ple_vocab_size=512)
    check_ids(np.arange(512), model, "here")
    check_ids(np.array([], dtype=np.int64), model, "here")
    with pytest.raises(
        UsageError, match=r"here: token 'x512' \(id 512\) has no row in embed_tokens_per_layer \(512 rows"
    ):
        check_ids(np.array([[3, 519, 512]]), model, "here", lambda number: f"x{number}")
    with pytest.raises(UsageError, match=r"token id 520 has no row in embed_tokens \(520 rows, vocab_size"):
        check_ids(np.array([520]), model, "here")
    with pytest.raises(UsageError, match="token id -1 is negative"):
        check_ids(np.array([-1]), model, "here")


def test_placeholders_are_no_text() -> None:
    model = geometry(vocab_size=500)
    assert model.placeholders is not None and min(model.placeholder_ids) > 500
    check_ids(np.array(sorted(model.placeholder_ids)), model, "here")
    text = replace(model, placeholders=None)
    with pytest.raises(UsageError, match="token id 504"):
        check_ids(np.array(sorted(model.placeholder_ids)), text, "here")


def test_labels_are_held_against_the_head() -> None:
    model = geometry(vocab_size=520, ple_vocab_size=512)
    check_labels(np.array([-100, 519]), model, "labels")
    with pytest.raises(UsageError, match=r"labels: token id 520 has no row in embed_tokens"):
        check_labels(np.array([-100, 520]), model, "labels")


def _add_token(folder: Path, token: str, number: int) -> None:
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["added_tokens"].append({**whole["added_tokens"][-1], "id": number, "content": token, "special": False})
    path.write_text(json.dumps(whole))


def _rows(text: str) -> list[dict[str, object]]:
    return [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]}]


def test_data_with_an_added_token_is_refused(tmp_path: Path) -> None:
    """A tokenizer with a token more than the model has rows, beside a model that was not resized."""
    model = model_folder(tmp_path / "model")
    _add_token(model, "<ticket>", 512)
    (tmp_path / "data").mkdir()
    assert len(corpus_of(tmp_path / "data", model, _rows("no ticket"))) == 1
    for on_error in ("fail", "skip"):  # no fault of the record
        with pytest.raises(UsageError, match=r":1: token '<ticket>' \(id 512\) has no row in embed_tokens \(512 rows"):
            corpus_of(tmp_path / "data", model, _rows("a <ticket> here"), on_error=on_error)


def test_a_cache_of_a_larger_model_is_not_taken(tmp_path: Path) -> None:
    """The same tokenizer, the same data: tokenised for 520 rows, opened for 512."""
    model = model_folder(tmp_path / "model")
    _add_token(model, "<ticket>", 512)
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "data").mkdir()
    larger = {**config["text_config"], "vocab_size": 520, "vocab_size_per_layer_input": 520}
    (model / "config.json").write_text(json.dumps({**config, "text_config": larger}))
    assert len(corpus_of(tmp_path / "data", model, _rows("a <ticket> here"))) == 1
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="<ticket>"):
        corpus_of(tmp_path / "data", model, _rows("a <ticket> here"))


def test_inspect_names_tokens_without_rows(tmp_path: Path) -> None:
    write_toy("e2b", tmp_path / "whole")
    assert inspect_folder(tmp_path / "whole").unknown_tokens == ()
    write_toy("e2b", tmp_path / "few", vocab_size=511, ple_vocab_size=510)
    found = inspect_folder(tmp_path / "few")
    assert [(number, table) for number, _, table in found.unknown_tokens] == [
        (510, "embed_tokens_per_layer"),
        (511, "embed_tokens"),
    ]
    assert [row["id"] for row in found.to_json()["tokens_without_rows"]] == [510, 511]
    (tmp_path / "few" / "tokenizer.json").write_text("[]")
    assert tokens_without_rows(tmp_path / "few", found.geometry) == ()
