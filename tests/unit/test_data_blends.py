"""Several sources: their shares on every rank, an order of their own, the same after every restart."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.errors import DataError, UsageError
from recipes.data import Batches
from recipes.data.blend import Blend, BlendSource
from recipes.data.order import ALL, WEIGHTED_ROWS, Order, Plans, Position, Share, apportioned, interleave
from recipes.data.packing import plan_epoch
from recipes.data.training import batch_options, corpora

from .blend_cases import CHATS_AND_CODE, said
from .data_helpers import chat, corpus_of

WIDTH = 96
# Weights as people give them, even, uneven, tiny, no round numbers.
WEIGHTS = ([1, 1], [0.7, 0.3], [9, 1], [2, 1, 1], [0.6, 0.3, 0.05, 0.05], [1] * 5, [0.617, 0.383])


def order_of(shares: Sequence[Share], sizes: Sequence[int], *, seed: int = 1, packing: bool = False) -> Order:
    """An order over sources of `sizes` samples, of lengths that differ."""

    def plans(number: int, size: int) -> Plans:
        lengths = 5 + np.random.default_rng(number).integers(0, 60, size)

        def plan(epoch: int) -> Any:
            return plan_epoch(
                lengths[:, None], epoch=epoch, seed=seed, shuffle=True, packing=packing, seq_length=WIDTH, source=number
            )

        return Plans(plan, lengths, fixed=None if packing else size)

    return Order([plans(number, size) for number, size in enumerate(sizes)], shares, seed)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_are_kept_over_10000_rows_in_sum_and_by_every_rank(weights: list[float], record_property: Any) -> None:
    """In sum and per rank, whatever the number of ranks and of rows that they take at once; 0.5 % of all rows."""
    shares = np.asarray(weights) / sum(weights)
    order = order_of([Share(weight) for weight in weights], [50 * (n + 1) for n in range(len(weights))])
    sources = order.interleaved(0, order.counts(order.start().places))
    worst = 0.0
    for ranks in (1, 2, 3, 4, 6, 8):
        for micro in (1, 2, 4, 8):
            rank = np.arange(len(sources)) // micro % ranks
            for one in range(ranks):
                # Of every rank 10,000 rows, or all that an exact count has; and 10,000 rows of all ranks together.
                for mine in (sources[rank == one][:10_000], sources[:10_000][rank[:10_000] == one]):
                    found = np.bincount(mine, minlength=len(weights)) / len(mine)
                    worst = max(worst, float(np.abs(found - shares).max()))
    record_property("worst", worst)
    assert worst <= 0.005


def test_ranks_take_the_shares_that_the_rows_have() -> None:
    """The same through `ahead`, from a place in the middle on, across an exact count and a source's own epochs."""
    shares = [Share(0.5), Share(0.3), Share(0.2)]
    order = order_of(shares, [40, 7, 1000])
    counts = order.counts(order.start().places)
    rows, behind = order.ahead(10_000, Position(0, 60_000, ((750, 3), (2570, 5), (12, 12)), counts))
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            mine = [source for source, _ in rows[rank::ranks]]
            found = np.bincount(mine, minlength=3) / len(mine)
            assert np.abs(found - [0.5, 0.3, 0.2]).max() <= 0.005
    assert (behind.epoch, behind.row) == (1, 70_000 - WEIGHTED_ROWS)
    # Each source is gone through to its end before any of it comes again.
    every, _ = order.ahead(6000, order.start())
    for source, size in enumerate((40, 7, 1000)):
        own = [row[0] for of, row in every if of == source]
        assert all(sorted(own[at : at + size]) == list(range(size)) for at in range(0, len(own) - size, size))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "shares",
    [[ALL, ALL], [Share(3.0), Share(1.0)], [Share(tokens=700), Share(repeat=3)], [Share(tokens=4000, repeat=3), ALL]],
    ids=["all", "weights", "tokens", "more tokens"],
)
def test_a_source_added_at_the_end_leaves_the_others_alone(shares: list[Share], packing: bool) -> None:
    """Each source's own rows come as before, whatever is added, and whatever weight it has."""

    def own(order: Order, count: int) -> list[list[list[int]]]:
        rows, _ = order.ahead(count, order.start())
        return [[row for source, row in rows if source == number] for number in range(len(order.plans))]

    before = own(order_of(shares, [40, 90], packing=packing), 400)
    added = Share(5.0) if shares[0].weight else ALL
    after = own(order_of([*shares, added], [40, 90, 30], packing=packing), 400)
    assert after[2]
    for old, new in zip(before, after, strict=False):
        common = min(len(old), len(new))
        assert common >= 3 and old[:common] == new[:common]
    # And as in a run on the first source alone.
    alone = own(order_of([ALL], [40], packing=packing), 400)[0]
    common = min(len(before[0]), len(alone))
    assert alone[:common] == before[0][:common]


@pytest.mark.parametrize("packing", [False, True])
def test_a_sources_order_is_of_its_number_alone(packing: bool) -> None:
    """Sources as large as each other have orders of their own; nothing but seed, epoch and number makes one."""
    size = 40
    lengths = np.full((size, 1), WIDTH if packing else 9)  # a sample a row, packed or not

    def order(source: int, epoch: int = 0, seed: int = 1, count: int = size) -> list[int]:
        plan = plan_epoch(
            lengths[:count],
            epoch=epoch,
            seed=seed,
            shuffle=True,
            packing=packing,
            seq_length=WIDTH,
            source=source,
        )
        return plan.order.tolist()

    # The first one's is that of a run on it alone, as versions without sources had it.
    every = {
        (source, epoch, seed): order(source, epoch, seed) for source in range(4) for epoch in (0, 1) for seed in (1, 2)
    }
    assert len({tuple(each) for each in every.values()}) == len(every)
    for (source, epoch, seed), found in every.items():
        for count in (size, 7):
            generator = np.random.Generator(np.random.PCG64([seed, epoch, *([source] if source else [])]))
            expected = generator.permutation(count)
            if packing:
                expected = expected[generator.permutation(count)]
            assert (found if count == size else order(source, epoch, seed, count)) == expected.tolist()
    rows, _ = order_of([ALL, ALL], [size, size], packing=packing).ahead(60, Position(0, 0, ((0, 0), (0, 0))))
    first, second = ([row for source, row in rows if source == number] for number in (0, 1))
    common = min(len(first), len(second))
    assert common > 5 and first[:common] != second[:common]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "shares",
    [
        [ALL],
        [ALL, ALL, ALL],
        [Share(0.7), Share(0.2), Share(0.1)],
        [Share(tokens=300), Share(tokens=5000, repeat=9), Share(repeat=2)],
    ],
    ids=["one", "all", "weights", "tokens"],
)
def test_killed_anywhere_the_order_goes_on(shares: list[Share], packing: bool) -> None:
    """From any place, written down and read by a process that knows nothing else, with any number of rows at a time."""
    sizes = [30, 23, 11][: len(shares)]

    def fresh() -> Order:
        return order_of(shares, sizes, packing=packing)

    undisturbed, end = fresh().ahead(300, fresh().start())
    dice = np.random.default_rng(0)
    # Once each, and then one run that is killed 20 times.
    for kills in [*([kill] for kill in (0, 1, 29, 30, 31, 64, 150)), sorted(dice.integers(0, 300, 20).tolist())]:
        found: list[Any] = []
        written = json.dumps(fresh().start().to_json())
        for kill in [*kills, 300]:
            order = fresh()
            place = order.position(json.loads(written))
            while len(found) < kill:
                rows, place = order.ahead(min(int(dice.integers(1, 40)), kill - len(found)), place)
                found += rows
            written = json.dumps(place.to_json())
        assert found == undisturbed, f"killed behind rows {kills}"
        assert json.loads(written) == json.loads(json.dumps(end.to_json()))


def test_an_epoch_has_what_was_asked_for() -> None:
    """Everything once, or so often, or whole rows until so many tokens are reached, epoch after epoch."""
    order = order_of([ALL, Share(repeat=2), Share(tokens=500)], [30, 20, 100])
    tokens = order.plans[2]._tokens
    place, at = order.start(), 0
    for epoch in range(3):
        rows, place = order.ahead(order.rows(epoch), place)
        assert (place.epoch, place.row) == (epoch + 1, 0)
        mine = [[row[0] for source, row in rows if source == number] for number in range(3)]
        assert sorted(mine[0]) == list(range(30)) and Counter(mine[1]) == Counter([*range(20)] * 2)
        spent = int(tokens[mine[2]].sum())
        assert 500 <= spent < 500 + int(tokens.max())
        at += len(mine[2])
    assert place.places == ((3, 0), (6, 0), (0, at))


def test_apportioned() -> None:
    assert apportioned([1, 1, 1], 10) == (4, 3, 3) and apportioned([0.25, 0.75], 4) == (1, 3)
    assert Counter(interleave((3, 5, 0), 1, 0).tolist()) == {0: 3, 1: 5}
    assert interleave((300, 500), 1, 0).tolist() != interleave((300, 500), 2, 0).tolist()


def test_the_next_epoch_is_planned_while_one_is_used() -> None:
    """By a thread, before it is asked for; what goes wrong there is raised where it is due."""
    import threading

    made: dict[int, str] = {}
    begun = threading.Event()

    def plan(epoch: int) -> Any:
        made[epoch] = threading.current_thread().name
        begun.set() if epoch == 1 else None
        if epoch == 2:
            raise DataError("the third epoch cannot be planned")
        return plan_epoch(lengths[:, None], epoch=epoch, seed=1, shuffle=True, packing=False, seq_length=WIDTH)

    lengths = np.full(1500, 9)
    order = Order([Plans(plan, lengths, fixed=1500)], [ALL], 1)
    _, place = order.ahead(1, order.start())
    assert begun.wait(60), "not before the edge"
    assert made[0] == threading.current_thread().name and made[1] == "plan"
    rows, place = order.ahead(1500, place)
    assert len(rows) == 1500 and place.epoch == 1
    with pytest.raises(DataError, match="the third epoch cannot be planned"):
        order.ahead(1500, place)
    order.close()
    assert "plan" not in [thread.name for thread in threading.enumerate()]


def test_more_tokens_than_there_are(model: Path, files: Path) -> None:
    sources = "[{path: DIR/chats.jsonl}, {path: DIR/facts.jsonl, tokens: 5000REPEAT}]"
    with pytest.raises(
        UsageError, match=r"sources\[1\] \(facts\): tokens=5000 are more than its \d+ tokens; repeat=\d"
    ):
        corpora(said(model, files, sources.replace("REPEAT", "")))
    with pytest.raises(UsageError, match=r"sources\[1\] \(facts\): tokens=5000 are more than 2 times its"):
        corpora(said(model, files, sources.replace("REPEAT", ", repeat: 2")))
    assert len(corpora(said(model, files, sources.replace("REPEAT", ", repeat: 99"))).train) == 30
    with (
        pytest.raises(DataError, match=r"data.eval.chats: is the name of what data.val_fraction")
        if False
        else pytest.raises(UsageError, match=r"data.eval.chats: is the name of what data.val_fraction holds out")
    ):
        keys = ("data.val_fraction=0.1", f"data.eval.chats={files}/code.jsonl", "train.eval_every=1")
        corpora(said(model, files, CHATS_AND_CODE, *keys))


def test_a_blend_goes_on_at_any_number_of_ranks(model: Path, files: Path) -> None:
    """No row is lost or seen twice, and every rank says the same place."""
    recipe = said(model, files, CHATS_AND_CODE)
    blend = corpora(recipe).train

    def taken(ranks: int, micro: int, steps: int, state: Any) -> tuple[list[list[int]], Any]:
        rows: list[list[list[int]]] = []
        states = []
        for rank in range(ranks):
            options = replace(batch_options(recipe, rank, ranks), micro_batch_size=micro, workers=0)
            with Batches(blend, options) as batches:
                if state is not None:
                    batches.load_state_dict(state)
                rows += [list(map(list, batch["input_ids"].tolist())) for batch in islice(batches, steps)]
                states.append(json.loads(json.dumps(batches.state_dict())))
        assert all(one == states[0] for one in states)
        return [row for batch in rows for row in batch], states[0]

    def bare(rows: list[list[int]]) -> Counter[tuple[int, ...]]:
        return Counter(tuple(token for token in row if token) for row in rows)

    whole, _ = taken(1, 4, 12, None)
    first, state = taken(2, 2, 5, None)
    second, state = taken(4, 1, 4, state)
    third, _ = taken(1, 4, 3, state)
    assert bare(whole) == bare(first + second + third)


def test_what_a_blend_is_refused_for_when_it_goes_on(model: Path, files: Path) -> None:
    """Other shares, another source, other tokens of one source: each named; begun anew where that is asked for."""

    def batches(sources: str, *keys: str) -> Batches:
        recipe = said(model, files, sources, *keys)
        return Batches(corpora(recipe).train, replace(batch_options(recipe), workers=0), told.append)

    told: list[str] = []
    with batches(CHATS_AND_CODE) as before:
        shorter = int(before.corpus.lengths.max()) - 1
        list(islice(before, 7))
        state = json.loads(json.dumps(before.state_dict()))
    third = CHATS_AND_CODE.replace("]", ", {path: DIR/facts.jsonl, weight: 1}]")
    for sources, keys, cause in [
        (
            CHATS_AND_CODE.replace("3", "2"),
            [],
            r"data.sources was 'chats weight=3, code weight=1' and is 'chats weight=2",
        ),
        (
            third,
            [],
            r"facts: the data changed.*data.sources was 'chats weight=3, code weight=1' and is '.*facts weight=1'",
        ),
        (CHATS_AND_CODE, [f"train.seq_length={shorter}"], f"train.seq_length was 128 and is {shorter}"),
        (CHATS_AND_CODE, ["data.shuffle=false"], r"data.shuffle was True and is False"),
    ]:
        with pytest.raises(DataError, match=cause):
            batches(sources, *keys).load_state_dict(state)
        with batches(sources, *keys, "data.on_change=restart") as anew:
            anew.load_state_dict(state)
            assert re.search(cause + ".*the data is begun anew", told[-1]) and anew.position == anew.order.start()
    # Another length that no sample feels: the tokens are the same, and so are the rows.
    with batches(CHATS_AND_CODE, "train.seq_length=120") as same:
        same.load_state_dict(state)
        assert (
            told[-1]
            == "the data goes on behind row 7, though train.seq_length was 128 and is 120: the tokens are the same"
        )
        assert next(same)["input_ids"].equal(next(before)["input_ids"])


def test_a_source_needs_no_other_to_be_read_again(model: Path, files: Path) -> None:
    """Each has a cache of its own: one that is added leaves those of the others."""
    recipe = said(model, files, CHATS_AND_CODE)
    before = {source.samples.folder for source in _sources(recipe)}
    third = CHATS_AND_CODE.replace("]", ", {path: DIR/facts.jsonl, weight: 1}]")
    after = {source.samples.folder for source in _sources(said(model, files, third))}
    assert before < after and len(after) == 3
    assert corpus_of(files, model, [chat("a", "b")]).folder.parent == next(iter(after)).parent


def _sources(recipe: Any) -> tuple[BlendSource, ...]:
    train = corpora(recipe).train
    assert isinstance(train, Blend)
    return train.sources
