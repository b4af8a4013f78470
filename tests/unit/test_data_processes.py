"""Tokenising in other processes: the bytes of one process, whatever happens; images counted by their headers."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridge.errors import DataError
from recipes.data import Batches, BatchOptions, Corpus, CorpusOptions, open_corpus, tokenising
from recipes.data.chat import ChatModel
from recipes.data.media import decode_image, image_size
from recipes.data.processes import Processes

from .data_helpers import caches, chat, files_of, model_folder, write_jsonl


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CorpusOptions:
    """A thousand records, of which other processes make all but the first block."""
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png")
    asked = {"role": "user", "content": [{"type": "image", "path": "a.png"}]}
    seen = {"messages": [asked, {"role": "assistant", "content": "x"}]}
    rows: list[Any] = [seen if n % 100 == 7 else "" if n % 100 == 8 else chat("q", f"a {n}") for n in range(1000)]
    rows[500] = "not JSON"
    monkeypatch.setattr(tokenising, "_ALONE_S", 0.0)
    monkeypatch.setattr(tokenising, "_GROUP_BATCHES", 2)
    # There is no telling how far this process gets until the others are ready: it waits for them.
    monkeypatch.setattr(Processes, "ready", True)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    return CorpusOptions(str(path), 256, on_error="skip", workers=2, cache=str(tmp_path / "cache"))


def test_processes_make_the_bytes_of_one(
    options: CorpusOptions, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted and gone on with by one process, and what is said of bad records, too."""
    told: list[str] = []
    groups: list[Any] = []
    ask = Processes.ask
    monkeypatch.setattr(Processes, "ask", lambda self, group: (groups.append(group), ask(self, group))[1])
    alone = open_corpus(replace(options, workers=1, cache=str(tmp_path / "alone")), model, notify=told.append)
    assert not groups and len(told) == 1

    def interrupt(read: int, share: float) -> None:
        if read >= 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_corpus(options, model, progress=interrupt)
    assert groups
    also: list[str] = []
    resumed = open_corpus(replace(options, workers=1), model, notify=also.append)
    assert re.fullmatch(r"tokenising goes on behind the 3\d\d records of an interrupted run", also[0])
    assert files_of(resumed.folder) == files_of(alone.folder) and also[1:] == told


@pytest.mark.slow
def test_processes_to_the_end_and_killed(
    options: CorpusOptions, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = open_corpus(replace(options, workers=1, cache=str(tmp_path / "alone")), model)
    assert files_of(open_corpus(options, model).folder) == files_of(alone.folder)
    strict = replace(options, on_error="fail", cache=str(tmp_path / "strict"))
    with pytest.raises(DataError, match=r"a\.jsonl:501: not JSON"):
        open_corpus(strict, model)
    assert not caches(tmp_path / "strict")
    started: list[Processes] = []
    ask = Processes.ask
    monkeypatch.setattr(Processes, "ask", lambda self, group: (started.append(self), ask(self, group))[1])

    def kill(read: int, share: float) -> None:
        for pid in started[-1].pids if started else ():
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(
        DataError, match=r"data\.workers: a process that tokenises has died \(code -9; out of memory\?\)"
    ):
        open_corpus(replace(options, cache=str(tmp_path / "killed")), model, progress=kill)
    said: list[str] = []
    resumed = open_corpus(replace(options, workers=1, cache=str(tmp_path / "killed")), model, notify=said.append)
    assert said[0].startswith("tokenising goes on behind") and files_of(resumed.folder) == files_of(alone.folder)


def ends(options: CorpusOptions, model: Path, cache: Path, kills: list[tuple[int, int, int | str]]) -> list[int]:
    """How preparations ended that were killed when, as `preparing` has it."""
    arguments = [str(options.path), str(model), str(cache), json.dumps(kills)]
    command = [sys.executable, "-m", "tests.unit.preparing", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
    found: list[int] = json.loads(done.stdout)
    return found


def order(corpus: Corpus) -> list[list[int]]:
    """The rows of two epochs, packed."""
    batches = Batches(corpus, BatchOptions(256, packing=True, seed=3))
    return [batches.plan(epoch).row(row) for epoch in (0, 1) for row in range(batches.rows(epoch))]


def test_killed_in_the_middle(options: CorpusOptions, tmp_path: Path, model: Path) -> None:
    """By SIGKILL, when so many records are done: what is there is gone on with, to the same bytes."""
    alone = replace(options, workers=1)
    assert ends(alone, model, tmp_path / "killed", [(1, 300, 0)]) == [-signal.SIGKILL]
    said: list[str] = []
    resumed = open_corpus(replace(alone, cache=str(tmp_path / "killed")), model, notify=said.append)
    assert "tokenising goes on behind the 288 records of an interrupted run" in said
    whole = open_corpus(alone, model)
    assert files_of(resumed.folder) == files_of(whole.folder) and order(resumed) == order(whole)
    assert caches(tmp_path / "killed") == [resumed.folder]


@pytest.mark.slow
def test_killed_twenty_times(options: CorpusOptions, tmp_path: Path, model: Path) -> None:
    """At twenty points, by one process and by two, at every step of writing a part, while the parts are joined and
    behind that."""
    kills: list[tuple[int, int, int | str]] = [(1 + (n % 6 == 5), 30 + 50 * n, n) for n in range(17)]
    kills += [(1, 990, "mkdtemp"), (1, 1000, 70), (1, 0, "rmtree")]
    assert ends(options, model, tmp_path / "killed", kills) == [-signal.SIGKILL] * 20
    resumed = open_corpus(replace(options, workers=1, cache=str(tmp_path / "killed")), model)
    whole = open_corpus(replace(options, workers=1), model)
    assert files_of(resumed.folder) == files_of(whole.folder) and order(resumed) == order(whole)
    assert caches(tmp_path / "killed") == [resumed.folder]


def test_signals_are_the_runs_own() -> None:
    """A queue tells every process of a job: the run ends its processes, none of them says that it has died."""
    with Processes(1, "tests.unit.answering", ()) as processes:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(processes.pids[0], number)  # it has hardly begun
        assert processes.ask(3) == 4
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(processes.pids[0], number)
        assert processes.ask(4) == 5


def picture(form: str, size: tuple[int, int], **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (9, 99, 199)).save(buffer, form, **options)
    return buffer.getvalue()


def test_images_are_counted_by_their_headers(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are those of the decoded image, whatever turns it; what is not whole is decoded, and so refused."""
    turned = Image.Exif()
    turned[0x0112] = 6
    whole = [picture(form, (30, 20)) for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    whole += [picture(form, (30, 20), exif=turned) for form in ("PNG", "JPEG", "WEBP", "TIFF")]
    for data in whole:
        assert image_size(data, "x") == decode_image(data, "x").size
        with pytest.raises(DataError, match="not an image that can be read"):
            image_size(data[:60], "x")
    assert [image_size(data, "x") for data in whole[6:]] == [(20, 30)] * 4
    jpeg = picture("JPEG", (64, 48))
    monkeypatch.setattr("recipes.data.media.decode_image", lambda data, at: pytest.fail("decoded"))
    assert image_size(jpeg, "x") == (64, 48) and image_size(jpeg + b"\0\0", "x") == (64, 48)


def counted(variant: str, folder: Path, sizes: list[tuple[int, int]]) -> None:
    """Of each size the processor itself has as many soft tokens as the header says."""
    chat_model = ChatModel(model_folder(folder / variant, variant), CorpusOptions("x", 4096))
    processor = chat_model.media.processor
    for width, height in sizes:
        ours = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
        pixels = np.zeros((height, width, 3), np.uint8)
        theirs = processor.image_processor(pixels, return_tensors="pt")["num_soft_tokens_per_image"]
        assert [int(one) for one in theirs] == [int(one) for one in ours], (variant, width, height)


def random_sizes(count: int) -> list[tuple[int, int]]:
    dice = random.Random(3)
    return [(round(2 ** dice.uniform(4, 10)), round(2 ** dice.uniform(4, 10))) for _ in range(count)]


@pytest.mark.parametrize("variant", ["e2b", "12b"])
def test_counts_are_the_processors(variant: str, tmp_path: Path) -> None:
    counted(variant, tmp_path, random_sizes(25))


@pytest.mark.slow
def test_counts_are_the_processors_in_a_thousand_sizes(tmp_path: Path) -> None:
    counted("e2b", tmp_path, random_sizes(1000))
