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

from bridge.errors import BridgeError, DataError, UsageError
from recipes.check import check_recipe, check_startable
from recipes.config import load_recipe, resolve, to_yaml
from recipes.data import Batches
from recipes.data.blend import Blend, Source
from recipes.data.order import ALL, WEIGHTED_ROWS, Order, Plans, Position, Share, apportioned, interleave
from recipes.data.packing import plan_epoch
from recipes.data.training import batch_options, corpora, rows_of_run, streams

from .data_helpers import chat, corpus_of, model_folder, write_jsonl

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of chats (20), code (30, Alpaca's columns), facts (10) and pairs (8)."""
    folder = tmp_path_factory.mktemp("files")
    write_jsonl(folder / "chats.jsonl", [chat(f"hello {n}", f"good day {n}") for n in range(20)])
    write_jsonl(folder / "code.jsonl", [{"instruction": f"add {n}", "output": f"{n} + {n}"} for n in range(30)])
    write_jsonl(folder / "facts.jsonl", [{"text": f"the number {n} is {n * n} squared"} for n in range(10)])
    pairs = [{"prompt": f"say {n}", "chosen": str(n), "rejected": f"no {n}"} for n in range(8)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "more.jsonl", pairs[:5])
    labelled = [{"prompt": f"say {n}", "completion": str(n), "label": n % 2 == 0} for n in range(8)]
    write_jsonl(folder / "labelled.jsonl", labelled)
    write_jsonl(folder / "others.jsonl", labelled[:5])
    return folder


def said(model: Path, files: Path, sources: str, *keys: str) -> Any:
    recipe = {
        "output": "run",
        "model": {"hf": str(model)},
        "data": {"cache": str(files / "cache")},
        "train": {"steps": 10, "global_batch_size": 4, "seq_length": 128, "seed": 3},
    }
    return resolve(recipe, [f"data.sources={sources}".replace("DIR", str(files)), *keys])


CHATS_AND_CODE = "[{path: DIR/chats.jsonl, weight: 3}, {path: DIR/code.jsonl, weight: 1}]"


def test_sources_of_a_recipe(model: Path, files: Path) -> None:
    """Each with its own keys, what it does not say as the data has it; the batches hold what was asked for."""
    own = "{path: [DIR/code.jsonl], name: sums, weight: 1, format: alpaca, max_samples: 25}"
    sources = f"[{{path: DIR/chats.jsonl, weight: 3}}, {own}]"
    recipe = said(model, files, sources)
    check_startable(recipe, 1)
    opened = corpora(recipe)
    assert isinstance(opened.train, Blend) and len(opened.train) == 45
    assert [(source.name, len(source.samples)) for source in opened.train.sources] == [("chats", 20), ("sums", 25)]
    assert opened.notes == ("source sums is of its first 25 of 30 samples (max_samples)",)
    with Batches(opened.train, batch_options(recipe)) as batches:
        rows, _ = batches.ahead(400, batches.position)
    assert sum(row[0] < 20 for row in rows) == pytest.approx(300, abs=2)
    assert {row[0] for row in rows} == set(range(45))
    assert [str(opened.train.where(sample)) for sample in (0, 44)] == [
        f"{files}/chats.jsonl:1",
        f"{files}/code.jsonl:25",
    ]
    assert resolve(json.loads(json.dumps(_plain(recipe)))) == recipe, "a resolved recipe is complete"


def _plain(recipe: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(to_yaml(recipe)))


def test_one_source_is_data_path(model: Path, files: Path) -> None:
    """The same tokens in the same order, and a checkpoint of one goes on with the other."""
    listed = said(model, files, "[{path: DIR/chats.jsonl}]")
    plain = resolve(_plain(listed), [f"data.path={files}/chats.jsonl"])
    assert not plain.data.sources, "an override takes the place of the recipe's own"
    assert resolve(_plain(plain), ["data.sources=[{path: x}]"]).data.path is None
    of = [Batches(corpora(recipe).train, batch_options(recipe)) for recipe in (listed, plain)]
    with of[0] as one, of[1] as other:
        for left, right in zip(islice(one, 30), islice(other, 30), strict=True):
            assert left["input_ids"].equal(right["input_ids"])
        assert one.state_dict() == other.state_dict() and set(one.state_dict()) == {"epoch", "row", "stream"}


def test_what_is_said_of_sources(model: Path, files: Path) -> None:
    """Once, before the first step: how much there is, how much is seen how often, what is not."""
    recipe = said(model, files, CHATS_AND_CODE)
    opened = corpora(recipe)
    found = streams(recipe, None, 0, 1, opened)  # type: ignore[arg-type]
    tokens = [int(source.samples.lengths.sum()) for source in opened.train.sources]  # type: ignore[union-attr]
    assert [line for line in found.notes if line.startswith("  source")] == [
        f"  source chats (weight=3): 20 samples, {tokens[0]} tokens, 20 rows; the run takes 30 rows (75.0%), 1.5 times "
        "all of them",
        f"  source code (weight=1): 30 samples, {tokens[1]} tokens, 30 rows; the run takes 10 rows (25.0%), 0.333 "
        f"times all of them, 20 rows (about {round(tokens[1] * 2 / 3)} tokens) are not used",
    ]
    assert found.facts["rows"] is None and [each["name"] for each in found.facts["sources"]] == ["chats", "code"]
    assert found.facts["sources"][1]["unused_rows"] == 20
    whole = said(
        model, files, "[{path: DIR/chats.jsonl, repeat: 2}, {path: DIR/code.jsonl, tokens: 100}]", "train.epochs=2"
    )
    _, factory = _prepared(whole)
    assert factory.train.steps == -(-2 * _epoch_rows(whole) // 4)


def _prepared(recipe: Any) -> tuple[Any, Any]:
    from recipes.data.training import prepared

    settled, factory = prepared(recipe)
    return factory, settled


def _epoch_rows(recipe: Any) -> int:
    return Batches(corpora(recipe).train, batch_options(recipe)).rows(0)


def test_held_out_of_every_source(model: Path, files: Path) -> None:
    """The same records whatever the seed and the weights, said, and evaluated on by the names of the sources."""
    keys = ("data.val_fraction=0.2", "train.eval_every=5")
    opened = corpora(said(model, files, CHATS_AND_CODE, *keys))
    assert {name: len(held) for name, held in opened.evaluation.items()} == {"chats": 4, "code": 6}
    assert (
        "4 of 20 samples of chats are held out and evaluated on, chosen by their content (data.val_fraction=0.2)"
        in opened.notes
    )
    again = corpora(said(model, files, CHATS_AND_CODE.replace("3", "1"), "train.seed=99", *keys))
    alone = corpora(said(model, files, "[{path: DIR/chats.jsonl}]", *keys))
    held = [
        {one[sample].ids.tobytes() for sample in range(len(one))}
        for one in (opened.evaluation["chats"], again.evaluation["chats"], alone.evaluation["chats"])
    ]
    assert held[0] == held[1] == held[2] and len(held[0]) == 4
    trained = {opened.train[sample].ids.tobytes() for sample in range(len(opened.train))}
    assert not trained & held[0] and len(opened.train) == 40


@pytest.mark.parametrize(
    ("sources", "keys", "message"),
    [
        ("[{files: a.jsonl}]", [], "unknown key data.sources[0].files; did you mean data.sources[0].path?"),
        ("[{path: a}, {path: b, wieght: 1}]", [], "unknown key data.sources[1].wieght; did you mean"),
        ("{path: a}", [], "data.sources is a list: data.sources=[{path: FILE, weight: 1}, ...]"),
        ("[a.jsonl]", [], "data.sources[0] is a group of keys, not a value"),
        ("[{path: a, weight: many}]", [], "data.sources[0].weight: Value 'many'"),
        ("[{weight: 1}]", [], "data.sources[0]: path is not set"),
        ("[{path: x/a.jsonl}, {path: y/a.jsonl}]", [], "[1]: is called a, as data.sources[0] is; set its name"),
        ("[{path: a, name: b/c}]", [], "data.sources[0].name=b/c: is what the log calls it"),
        ("[{path: a, weight: 0}, {path: b, weight: 0}]", [], "data.sources: every weight is 0"),
        ("[{path: a, weight: -1}, {path: b, weight: 1}]", [], "[0] (a): weight=-1.0: must be a number of at least 0"),
        ("[{path: a, weight: .nan}, {path: b, weight: 1}]", [], "data.sources[0] (a): weight=nan: must be a number"),
        ("[{path: a, weight: 1}]", [], "data.sources[0]: a weight has no meaning for the only source"),
        ("[{path: a, weight: 1}, {path: b}]", [], "data.sources[1] (b): has no weight, and others have"),
        (
            "[{path: a, weight: 1, tokens: 5}, {path: b, weight: 1}]",
            [],
            "data.sources[0] (a): tokens and weight both say",
        ),
        (
            "[{path: a, weight: 1, repeat: 2}, {path: b, weight: 1}]",
            [],
            "data.sources[0] (a): repeat and weight both say",
        ),
        ("[{path: a, tokens: 0}]", [], "data.sources[0] (a): tokens=0: must be at least 1"),
        ("[{path: a, repeat: 0}]", [], "data.sources[0] (a): repeat=0: must be at least 1"),
        ("[{path: a, max_samples: -1}]", [], "data.sources[0] (a): max_samples=-1: must be at least 0"),
        (
            "[{path: a, weight: 1}, {path: b, weight: 1}]",
            ["train.epochs=2"],
            "train.epochs=2: has no meaning where data.sources",
        ),
        ("[{path: a}]", ["data.path=b"], "data.path and data.sources: set one of them"),
    ],
)
def test_sources_that_cannot_be(sources: str, keys: list[str], message: str) -> None:
    base = {"output": "run", "model": {"hf": "toy"}, "train": {"steps": 3}}
    with pytest.raises(BridgeError) as caught:
        check_recipe(resolve(base, [f"data.sources={sources}", *keys]), 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_keys_of_sources_in_a_file(tmp_path: Path) -> None:
    text = "output: run\nmodel: {hf: toy}\ntrain: {steps: 3}\ndata:\n  sources:\n  - {path: a, wait: 1}\n"
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(
        UsageError, match=re.escape("r.yaml: unknown key data.sources[0].wait; did you mean data.sources[0].weight?")
    ):
        load_recipe(str(tmp_path / "r.yaml"))


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


@pytest.mark.parametrize(
    ("recipe", "files_"), [("dpo/smoke", ("pairs", "more")), ("kto/smoke", ("labelled", "others"))]
)
def test_preferences_blend(model: Path, files: Path, recipe: str, files_: tuple[str, str]) -> None:
    """Pairs stay together, and an answer is put behind the prompt before it in its own source."""
    import torch

    sources = f"[{{path: {files}/{files_[0]}.jsonl, weight: 1}}, {{path: {files}/{files_[1]}.jsonl, weight: 3}}]"
    chosen = load_recipe(recipe, [f"model.hf={model}", f"data.cache={files / 'cache'}", f"data.sources={sources}"])
    check_startable(chosen, 1)
    opened = corpora(chosen)
    found = streams(chosen, None, 0, 1, opened)  # type: ignore[arg-type]
    assert len(found.answers) == 2, "a reference is asked by the source, and kept with it"
    together = 2 if recipe == "dpo/smoke" else 1
    assert [len(each.samples) for each in found.answers] == [8 * together, 5 * together]
    for each in found.answers:
        rows = np.arange(len(each.samples), dtype=np.float64)
        found.ref_logps[each.samples.fingerprint] = np.stack([rows, rows + 100])
    with found.train as batches:  # type: ignore[attr-defined]
        seen = [next(batches) for _ in range(20)]
    numbers = torch.cat([batch["sample_ids"] for batch in seen]).tolist()
    assert sum(number >= 8 * together for number in numbers) / len(numbers) == pytest.approx(0.75, abs=0.03)
    own = [number if number < 8 * together else number - 8 * together for number in numbers]
    assert torch.cat([batch["ref_logps"] for batch in seen]).tolist() == own
    if together == 2:
        assert all(second == first + 1 for first, second in zip(numbers[::2], numbers[1::2], strict=True))


def test_prompts_of_rollouts_blend(model: Path, files: Path) -> None:
    keys = [f"model.hf={model}", f"data.cache={files / 'cache'}", "train.steps=8", f"data.sources={CHATS_AND_CODE}"]
    recipe = load_recipe("grpo/smoke", [key.replace("DIR", str(files)) for key in keys])
    check_startable(recipe, 1)
    assert rows_of_run(recipe) == 16
    opened = corpora(recipe)
    found = streams(recipe, None, 0, 1, opened)  # type: ignore[arg-type]
    said_of = [line for line in found.notes if line.startswith("  source")]
    taken = [int(re.findall(r"the run takes (\d+) rows", line)[0]) for line in said_of]
    assert sum(taken) == 16 and taken[0] == pytest.approx(12, abs=1), "of rows, three in four"


def test_a_source_needs_no_other_to_be_read_again(model: Path, files: Path) -> None:
    """Each has a cache of its own: one that is added leaves those of the others."""
    recipe = said(model, files, CHATS_AND_CODE)
    before = {source.samples.folder for source in _sources(recipe)}
    third = CHATS_AND_CODE.replace("]", ", {path: DIR/facts.jsonl, weight: 1}]")
    after = {source.samples.folder for source in _sources(said(model, files, third))}
    assert before < after and len(after) == 3
    assert corpus_of(files, model, [chat("a", "b")]).folder.parent == next(iter(after)).parent


def _sources(recipe: Any) -> tuple[Source, ...]:
    train = corpora(recipe).train
    assert isinstance(train, Blend)
    return train.sources


def test_shown_and_prepared_by_the_source(model: Path, files: Path, tmp_path: Path) -> None:
    """`data show` and `data prepare` of a recipe with sources have each of them, by its name."""
    from typer.testing import CliRunner

    from bridge.cli import app

    text = f"output: run\nmodel: {{hf: {model}}}\ntrain: {{steps: 3, seq_length: 128}}\n"
    text += f"data: {{cache: {files / 'cache'}}}\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    keys = [str(tmp_path / "recipe.yaml"), "data.sources=" + CHATS_AND_CODE.replace("DIR", str(files))]
    run = CliRunner()
    shown = run.invoke(app, ["data", "show", *keys, "-n", "1"])
    assert shown.exit_code == 0 and "source chats" in shown.output and "source code" in shown.output
    result = run.invoke(app, ["data", "show", *keys, "-n", "1", "--json", str(tmp_path / "shown.json")])
    assert result.exit_code == 0
    said = json.loads((tmp_path / "shown.json").read_text(encoding="utf-8"))
    assert {name: each["sample_count"] for name, each in said["sources"].items()} == {"chats": 20, "code": 30}
    result = run.invoke(app, ["data", "prepare", *keys, "--json", str(tmp_path / "made.json")])
    assert result.exit_code == 0, result.output
    made = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))["sets"]
    assert {name: each["samples"] for name, each in made.items()} == {"train/chats": 20, "train/code": 30}
