"""Pictures of records: from files, inline and fetched; what has changed since is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridge.errors import DataError

from .data_helpers import GOOD, corpus_of, part


def test_media_root(folder: Path, model: Path, tmp_path: Path) -> None:
    row = part(type="image", path="secret.png")
    assert corpus_of(folder, model, [row], media_root=str(tmp_path)).media_tensors(0)["pixel_values"].shape[0] == 1


def test_inline_and_fetched_media_are_kept_in_the_cache(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64

    data = (folder / "good.png").read_bytes()
    fetched = []
    monkeypatch.setattr("recipes.data.media._fetch", lambda url, at: fetched.append(url) or data)
    rows = [
        part(type="image", path="good.png"),
        part(type="image", base64=base64.b64encode(data).decode()),
        part(type="image", image="data:image/png;base64," + base64.b64encode(data).decode()),
        part(type="image", url="https://somewhere/good.png"),
    ]
    for _ in range(2):
        opened = corpus_of(folder, model, rows, allow_urls=True)
        expected = opened.media_tensors(0)
        for index in range(1, 4):
            for name, tensor in opened.media_tensors(index).items():
                assert tensor.equal(expected[name])
    assert fetched == ["https://somewhere/good.png"]


def test_media_that_changed_or_went(folder: Path, model: Path) -> None:
    opened = corpus_of(folder, model, [part(type="image", path="good.png")])
    Image.new("RGB", (100, 20)).save(folder / "good.png")
    with pytest.raises(DataError, match=r"data\.jsonl:1: its media have changed: \d+ tokens now, 64 when"):
        opened.media_tensors(0)
    (folder / "good.png").unlink()
    with pytest.raises(DataError, match=r"data\.jsonl:1: image: good.png: no such file"):
        opened.media_tensors(0)


def test_what_is_broken_inside_is_named_at_use(folder: Path, model: Path) -> None:
    """Header and end of the file are whole: it is counted, and record and file are named when it is decoded."""
    dice = np.random.default_rng(0)
    Image.fromarray(dice.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "good.png").write_bytes(whole[:2000] + bytes(50) + whole[2050:])
    opened = corpus_of(folder, model, [GOOD, part(type="image", path="good.png")])
    with pytest.raises(DataError, match=r"data\.jsonl:2: image 'good\.png': not an image that can be read \(broken"):
        opened.media_tensors(1)
