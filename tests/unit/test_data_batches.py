"""Packing loses and leaks nothing; the stream is the same every time, shared out among ranks, and goes on exactly."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bridge.errors import DataError, UsageError
from recipes.config import resolve
from recipes.data import Batches, BatchOptions, Corpus, Supervise
from recipes.data.chat import ChatModel
from recipes.data.epochs import with_steps
from recipes.data.packing import plan_epoch
from recipes.data.threads import ordered_map

from .data_helpers import chat, corpus_of, model_folder

WIDTH = 96


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """60 conversations of 20 to 60 tokens, no two alike, some with an image of a colour of its own."""
    folder = tmp_path_factory.mktemp("data")
    rows: list[Any] = []
    for index in range(60):
        row = chat(f"q{index}", "x" * (index * 7 % 40) + str(index))
        if index % 20 == 19:
            Image.new("RGB", (12, 12), (index, 0, 0)).save(folder / f"{index}.png")
            row = chat("q", str(index))
            row["messages"][0]["content"] = [{"type": "image", "path": f"{index}.png"}]
        rows.append(row)
    return corpus_of(folder, model_folder(folder / "model"), rows, seq_length=WIDTH)


def samples_of(corpus: Corpus, batch: dict[str, torch.Tensor]) -> list[int]:
    """Which samples a batch holds, by their tokens; every real token must be of one."""
    known = {tuple(corpus[index].ids.tolist()): index for index in range(len(corpus))}
    assert len(known) == len(corpus)
    ids, mask = batch["input_ids"].flatten().tolist(), batch["attention_mask"].flatten().tolist()
    starts = [*(batch["position_ids"].flatten() == 0).nonzero().flatten().tolist(), len(ids)]
    found = []
    for start, end in pairwise(starts):
        tokens = tuple(token for token, real in zip(ids[start:end], mask[start:end], strict=True) if real)
        if tokens:
            found.append(known[tokens])
    return found


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 2), (3, 4)])
def test_ranks_share_an_epoch(packing: bool, ranks: int, micro: int, corpus: Corpus) -> None:
    seen: Counter[int] = Counter()
    steps = set()
    for rank in range(ranks):
        options = BatchOptions(
            WIDTH, dp_rank=rank, dp_size=ranks, micro_batch_size=micro, packing=packing, epochs=1, pad_multiple=8
        )
        with Batches(corpus, options) as batches:
            mine = list(batches)
        steps.add(len(mine))
        for batch in mine:
            assert batch["input_ids"].shape[0] == micro
            assert batch["input_ids"].shape[1] % 8 == 0
            seen.update(samples_of(corpus, batch))
    assert seen == Counter(range(len(corpus)))
    assert len(steps) == 1


def test_epochs_differ_and_seeds_differ_and_runs_do_not(corpus: Corpus) -> None:
    def order(**options: Any) -> list[int]:
        with Batches(corpus, BatchOptions(WIDTH, **options)) as batches:
            return [samples_of(corpus, batch)[0] for batch in islice(batches, 2 * len(corpus))]

    first = order()
    assert first == order(workers=0) == order(workers=1, prefetch=1)
    assert sorted(first[:60]) == sorted(first[60:]) == list(range(60))
    assert first[:60] != first[60:]
    assert first != order(seed=1)
    assert order(shuffle=False) == [*range(60), *range(60)]


@pytest.mark.parametrize("packing", [False, True])
def test_resumed_anywhere_it_is_the_same(packing: bool, corpus: Corpus) -> None:
    """Stopped after any number of steps, with batches already made ahead; over the end of an epoch too."""
    options = BatchOptions(WIDTH, packing=packing, micro_batch_size=2, dp_size=2, dp_rank=1, prefetch=5)
    with Batches(corpus, options) as batches:
        whole = list(islice(batches, 40))
    for stop in (0, 1, 2, 7, 14, 15, 16, 30):
        with Batches(corpus, options) as batches:
            first = list(islice(batches, stop))
            state = batches.state_dict()
        with Batches(corpus, replace(options, prefetch=2)) as batches:
            next(batches)
            batches.load_state_dict(state)
            rest = list(islice(batches, 40 - stop))
            assert batches.position.epoch >= 1
        assert all(same(left, right) for left, right in zip(first + rest, whole, strict=True))


def test_resumed_with_other_ranks_no_row_is_lost_or_seen_twice(corpus: Corpus) -> None:
    def taken(ranks: int, micro: int, steps: int, state: dict[str, Any] | None) -> tuple[list[int], dict[str, Any]]:
        rows: list[list[int]] = []
        states = []
        for rank in range(ranks):
            options = BatchOptions(WIDTH, dp_rank=rank, dp_size=ranks, micro_batch_size=micro)
            with Batches(corpus, options) as batches:
                if state is not None:
                    batches.load_state_dict(state)
                rows.append([sample for batch in islice(batches, steps) for sample in samples_of(corpus, batch)])
                states.append(batches.state_dict())
        assert all(other == states[0] for other in states)
        return [sample for row in rows for sample in row], states[0]

    first, state = taken(2, 2, 5, None)
    second, state = taken(4, 1, 5, state)
    third, _ = taken(1, 4, 5, state)
    assert Counter(first + second + third) == Counter(range(60))


def test_a_place_in_other_rows_is_refused_or_begun_anew(corpus: Corpus) -> None:
    with Batches(corpus, BatchOptions(WIDTH, workers=0)) as batches:
        list(islice(batches, 7))
        state = batches.state_dict()
    for options, cause in [
        ({"seed": 1}, r"train.seed was 0 and is 1"),
        ({"shuffle": False}, r"data.shuffle was True and is False"),
        ({"packing": True}, r"data.packing was False and is True; train.seq_length was None and is 96; pack_buffer"),
    ]:
        with pytest.raises(DataError, match=rf"in other rows: {cause}.*data.on_change=restart"):
            Batches(corpus, BatchOptions(WIDTH, **options)).load_state_dict(state)
        told: list[str] = []
        restarted = Batches(corpus, BatchOptions(WIDTH, on_change="restart", workers=0, **options), told.append)
        restarted.load_state_dict(state)
        assert restarted.position.epoch == restarted.position.row == 0 and len(told) == 1
        assert re.search(rf"in other rows: {cause}.*; the data is begun anew", told[0])
        with Batches(corpus, BatchOptions(WIDTH, workers=0, **options)) as fresh:
            assert same(next(restarted), next(fresh))
    with pytest.raises(DataError, match=r"of a version that did not note which tokens"):
        Batches(corpus, BatchOptions(WIDTH)).load_state_dict({**state, "stream": {"data": "x", "seed": 0}})
    with pytest.raises(UsageError, match=r"data.on_change: 'ignore' is not one of refuse, restart"):
        BatchOptions(WIDTH, on_change="ignore")


def test_only_other_tokens_are_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tokens were made with may change as long as they do not; where they do, the cause is named."""
    model, rows = model_folder(tmp_path / "model"), [chat("q", "x" * size) for size in (5, 9, 70, 20)]

    def stream(changed: list[Any] | None = None, **options: Any) -> Batches:
        opened = corpus_of(tmp_path, model, changed or rows, **{"seq_length": 64, **options})
        return Batches(opened, BatchOptions(96, workers=0))

    with stream() as batches:
        next(batches)
        state = json.loads(json.dumps(batches.state_dict()))
        second = next(batches)

    def goes_on(batches: Batches) -> bool:
        with batches:
            batches.load_state_dict(state)
            return same(next(batches), second)

    def refused(cause: str, batches: Batches) -> None:
        with pytest.raises(DataError, match=rf"in other rows: {cause}; undo that"):
            batches.load_state_dict(state)

    assert goes_on(stream(seq_length=60)) and goes_on(stream(on_error="skip"))
    template = tmp_path / "same.jinja"
    template.write_text((model / "chat_template.jinja").read_text() + "{# the same #}")
    assert goes_on(stream(chat_template=str(template)))
    refused(r"train.seq_length was 64 and is 96", stream(seq_length=96))
    refused(r"the data changed", stream([*rows, rows[0]]))
    refused(
        r"the data changed; data.supervise_turns was 'all' and is 'last'",
        stream([chat("a", "b", "c", "d")], supervise=Supervise(turns="last")),
    )
    template.write_text((model / "chat_template.jinja").read_text() + "x")
    refused(r"the chat template changed", stream(chat_template=str(template)))
    import transformers

    was = transformers.__version__
    monkeypatch.setattr(transformers, "__version__", "5.99.1")
    assert goes_on(stream())
    rendered = ChatModel._render
    changed = lambda self, samples: [text.replace("q", "Q") for text in rendered(self, samples)]  # noqa: E731
    monkeypatch.setattr(ChatModel, "_render", lambda self, samples, answer=False: changed(self, samples))
    monkeypatch.setattr(transformers, "__version__", "5.99.2")
    refused(f"transformers was '{was}' and is '5.99.2'", stream())


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_are_steps(packing: bool, corpus: Corpus) -> None:
    """As many as it takes to see every row, packed or not, over epochs whose packed rows differ in number."""
    said = {
        "output": "run",
        "model": {"hf": "toy"},
        "train": {"epochs": 2, "global_batch_size": 8, "seq_length": WIDTH},
    }
    recipe = resolve(said)
    with Batches(corpus, BatchOptions(WIDTH, packing=packing, workers=0, epochs=2)) as batches:
        rows = sum(int(batch["attention_mask"].any()) for batch in batches)
        settled = with_steps(recipe, batches)
        assert settled.train.steps == -(-rows // 8) and not settled.train.epochs
        assert (rows == 120) == (not packing)
        assert settled.train.steps * 8 / batches.rows(0) == pytest.approx(2, rel=0.1)
        half = with_steps(resolve(said, ["train.epochs=0.5"]), batches).train.steps
        assert half == math.ceil(math.ceil(batches.rows(0) / 2) / 8)
    assert with_steps(resolve(said, ["train.steps=7"]), batches).train.steps == 7


@pytest.mark.parametrize("packing", [False, True])
def test_media_come_in_the_order_of_their_placeholders(packing: bool, corpus: Corpus) -> None:
    """Every image has a colour that says which sample it belongs to."""
    found = []
    options = BatchOptions(256, packing=packing, micro_batch_size=7, epochs=1)
    with Batches(corpus, options) as batches:
        for batch in batches:
            holders = [sample for sample in samples_of(corpus, batch) if corpus[sample].media]
            images = batch.get("pixel_values", torch.zeros(0, 1, 1))
            colours = [round(float(image[0, 0]) * 255) for image in images]
            assert colours == holders
            soft = int((batch["mm_token_type_ids"] == 1).sum())
            valid = (batch["image_position_ids"][..., 0] >= 0).sum() if len(images) else 0
            assert soft == int(valid) // 9
            found += colours
    assert sorted(found) == [19, 39, 59]


def test_sounds_of_different_lengths_are_padded() -> None:
    from recipes.data.collate import join_media

    short, long = torch.ones(1, 3, 2), torch.ones(2, 5, 2)
    joined = join_media([{"input_features": short}, {}, {"input_features": long}])["input_features"]
    assert joined.shape == (3, 5, 2)
    assert joined.sum(dim=(1, 2)).tolist() == [6, 10, 10]
    ids = join_media([{"image_position_ids": torch.zeros(1, 1, 2)}, {"image_position_ids": torch.zeros(1, 2, 2)}])
    assert ids["image_position_ids"][0, 1].tolist() == [-1, -1]


def test_packing_is_worth_it(corpus: Corpus) -> None:
    with Batches(corpus, BatchOptions(256, packing=True)) as batches:
        efficiency = batches.plan(0).efficiency
        first = next(batches)
    assert efficiency is not None and efficiency > 0.9
    assert first["input_ids"].shape == (1, 256)
    assert first["cu_seqlens"].dtype == torch.int32
    dice = np.random.default_rng(0)
    lengths = np.clip(dice.lognormal(6, 1, 20_000).astype(np.int64), 8, 4096)
    started = time.monotonic()
    plan = plan_epoch(lengths, epoch=0, seed=0, shuffle=True, packing=True, seq_length=4096)
    assert plan.efficiency is not None and plan.efficiency > 0.97
    assert time.monotonic() - started < 10


def test_an_error_comes_where_it_is_due_and_threads_end(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    options = BatchOptions(WIDTH, shuffle=False, prefetch=8, epochs=1)
    media = corpus.media_tensors

    def broken(sample: int) -> dict[str, Any]:
        if sample == 5:
            raise DataError("row 5 is broken")
        return media(sample)

    monkeypatch.setattr(corpus, "media_tensors", broken)
    before = threading.active_count()
    with Batches(corpus, options) as batches:
        assert len(list(islice(batches, 5))) == 5
        with pytest.raises(DataError, match="row 5 is broken"):
            next(batches)
        assert threading.active_count() == before
        assert batches.position.row == 5


def test_ordered_map_keeps_order_and_looks_ahead_no_further() -> None:
    taken = []

    def items() -> Any:
        for item in range(100):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        return item

    results = ordered_map(work, items(), workers=4, ahead=6)
    assert [next(results) for _ in range(10)] == list(range(10))
    assert len(taken) <= 17
    assert list(results) == list(range(10, 100))


def test_options_that_make_no_sense(corpus: Corpus) -> None:
    for options, message in [
        ({"dp_rank": 2, "dp_size": 2}, "dp_rank: 2 is not below dp_size 2"),
        ({"micro_batch_size": 0}, "micro_batch_size: 0 is less than 1"),
        ({"packing": True, "document_multiple": 7}, "seq_length: 96 is not a multiple of 7"),
    ]:
        with pytest.raises(UsageError, match=message):
            BatchOptions(WIDTH, **options)
    with pytest.raises(DataError, match=r"its longest sample has \d+ tokens, a row only 16"):
        Batches(corpus, BatchOptions(16))


def test_show(corpus: Corpus, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import io

    from rich.console import Console

    from recipes.data.show import show

    plain, coloured = (
        Console(file=io.StringIO(), width=100),
        Console(file=io.StringIO(), width=100, force_terminal=True),
    )
    show(corpus, 2, plain)
    text = plain.file.getvalue()  # type: ignore[attr-defined]
    assert "⟦0<turn|>⟧" in text and "data.jsonl:1 · " in text and "60 read, 60 kept" in text and "real tokens" in text
    assert "(messages)" in text
    show(corpus, 2, coloured)
    assert "\x1b[1;32m0<turn|>\x1b[0m" in coloured.file.getvalue()  # type: ignore[attr-defined]
