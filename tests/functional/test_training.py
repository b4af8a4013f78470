"""The trainer against a plain transformers and torch loop, in every layout; and what a run goes on from and exports."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import BridgeError, TrainingError, UsageError
from bridge.geometry import Geometry
from bridge.ranks import RankPool
from bridge.toy import write_toy

from .training_kit import LENGTH, LR, MIN_LR, WARMUP, Plain, Trouble, losses, plain_loop, recipe, train_toy

STEPS, LAYOUT_STEPS = 30, 8
PEAK_TFLOPS = 0.5
AGAINST_TRANSFORMERS, ANOTHER_LAYOUT = 1e-4, 1e-5
# A corpus on which no routing decision of the 30 steps is a tie to float32: see `Plain.margin`. Followed with seed 2:
# in step 1 all choices agree, and router logits to 1e-6 of the largest. After the first update logits of layer 0 differ
# by 3e-5 (Adam's first step has the size of the learning rate whatever the gradient's: that may be why). In step 2,
# layer 4, one token's last expert leads by 1.6e-5 and another one is chosen: the loss is 1.3e-4 away.
SEEDS = {"26b-a4b": 34}
# Of the router's largest logit. With a lead of 1.1e-5 (seed 4) runs with torch's attention and with the plain one part
# in step 15; until then 1e-6 is between their losses.
MARGIN = 2e-5
VARIANTS = ("e2b", "e4b", "12b", "26b-a4b", "31b")

TP2 = ["parallel.tp=2", "parallel.sequence_parallel=true"]
PP2 = ["parallel.pp=2"]
CP2 = ["parallel.cp=2"]
PACKED = ["data.packing=true", "train.global_batch_size=2", f"train.seq_length={2 * LENGTH}"]
LAYOUTS: dict[str, tuple[str, int, list[str]]] = {
    "e2b microbatches of one": ("e2b", 1, ["train.micro_batch_size=1"]),
    "e2b one microbatch": ("e2b", 1, ["train.micro_batch_size=4"]),
    "e2b DP2": ("e2b", 2, []),
    "e2b DP2 overlap, full recompute": ("e2b", 2, ["parallel.overlap=true", "parallel.recompute=full"]),
    "e2b TP2+SP": ("e2b", 2, TP2),
    "e2b TP2": ("e2b", 2, ["parallel.tp=2"]),
    "e2b PP2": ("e2b", 2, PP2),
    "e2b packed, one row": ("e2b", 1, [*PACKED, "train.micro_batch_size=1"]),
    "26b-a4b packed, two rows": ("26b-a4b", 1, PACKED),
    "12b packed TP2+SP": ("12b", 2, [*PACKED, *TP2]),
    "31b-untied PP2": ("31b-untied", 2, PP2),
    "31b-untied TP2+SP": ("31b-untied", 2, TP2),
    "e4b PP2 VPP2": ("e4b", 2, [*PP2, "parallel.vpp=2"]),
    "12b TP2+SP PP2": ("12b", 4, [*TP2, *PP2, "train.micro_batch_size=1"]),
    "31b DP2 TP2+SP": ("31b", 4, TP2),
    "26b-a4b EP2": ("26b-a4b", 2, ["parallel.ep=2"]),
    "26b-a4b EP2 allgather": ("26b-a4b", 2, ["parallel.ep=2", "parallel.dispatcher=allgather"]),
    "26b-a4b TP2+SP EP2": ("26b-a4b", 2, [*TP2, "parallel.ep=2"]),
    "e2b CP2": ("e2b", 2, CP2),
    "12b packed TP2+SP CP2": ("12b", 4, [*PACKED, *TP2, *CP2]),
    "26b-a4b packed EP2 CP2": ("26b-a4b", 2, [*PACKED, *CP2, "parallel.ep=2", "train.micro_batch_size=1"]),
    "e4b PP2 CP2": ("e4b", 4, [*PP2, *CP2]),
    "26b-a4b EP2 PP2": ("26b-a4b", 4, [*PP2, "parallel.ep=2"]),
}


class Toys:
    """Toy checkpoints, and what the plain loop makes of them, each once."""

    def __init__(self, folder: Path, ranks: RankPool) -> None:
        self.folder = folder
        self.ranks = ranks
        self._plain: dict[str, Plain] = {}

    def __getitem__(self, variant: str) -> Path:
        path = self.folder / variant
        if not path.exists():
            write_toy(variant.removesuffix("-untied"), path, dtype="float32", untied=variant.endswith("-untied"))
        return path

    def plain(self, variant: str) -> Plain:
        if variant not in self._plain:
            seed = SEEDS.get(variant, 1)
            self._plain[variant] = self.ranks.run(plain_loop, str(self[variant]), STEPS, seed, world_size=1)[0]
        return self._plain[variant]

    def recipe(self, variant: str, output: Path, steps: int = STEPS) -> dict[str, Any]:
        return recipe(self[variant], output, steps, SEEDS.get(variant, 1))


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"), ranks)


def worst(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) <= len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_as_transformers_does(
    ranks: RankPool, toys: Toys, tmp_path: Path, record_property: Any, variant: str
) -> None:
    plain = toys.plain(variant)
    assert plain.margin > MARGIN, "a tie in the router: take another seed"
    ranks.run(train_toy, toys.recipe(variant, tmp_path), [f"log.peak_tflops={PEAK_TFLOPS}"], world_size=1)
    ours = losses(tmp_path)
    assert len(ours) == STEPS and ours[-1] < 0.9 * ours[0]
    record_property("worst", worst(ours, plain.losses))
    assert worst(ours, plain.losses) <= AGAINST_TRANSFORMERS
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert_rates(Geometry.from_folder(toys[variant]), lines)
    assert worst([line["grad_norm"] for line in lines], plain.norms) <= 1e-3
    assert lines[-1]["lr"] > MIN_LR and lines[WARMUP]["lr"] == pytest.approx(LR) == max(line["lr"] for line in lines)


BALANCE_STEPS, BALANCE, BALANCE_SEED = 5, 0.3, 13


@pytest.fixture(scope="module")
def balanced(ranks: RankPool, toys: Toys) -> Plain:
    """The plain loop with an auxiliary loss whose factor moves the losses."""
    toy = str(toys["26b-a4b"])
    (plain,) = ranks.run(plain_loop, toy, BALANCE_STEPS, BALANCE_SEED, BALANCE, world_size=1)
    (without,) = ranks.run(plain_loop, toy, BALANCE_STEPS, BALANCE_SEED, 1e-9, world_size=1)
    assert plain.margin > MARGIN, "a tie in the router: take another seed"
    assert worst(without.losses, plain.losses) > 50 * AGAINST_TRANSFORMERS
    return plain


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["parallel.recompute=full"]),
        (2, []),
        (2, ["parallel.pp=2"]),
        (2, ["parallel.cp=2"]),
        (4, ["parallel.tp=2", "parallel.sequence_parallel=true", "parallel.ep=2"]),
    ],
    ids=["recompute", "DP2", "PP2", "CP2", "TP2+SP EP2 DP2"],
)
def test_the_auxiliary_loss_is_the_one_of_the_paper(
    ranks: RankPool, toys: Toys, tmp_path: Path, balanced: Plain, world: int, overrides: list[str]
) -> None:
    """Labels are on a part of the tokens: what they are divided by is none of the auxiliary loss's business."""
    said = recipe(toys["26b-a4b"], tmp_path, BALANCE_STEPS, BALANCE_SEED)
    ranks.run(train_toy, said, [f"train.aux_loss={BALANCE}", *overrides], world_size=world)
    ours, logged = losses(tmp_path), losses(tmp_path, "aux_loss")
    assert len(ours) == len(logged) == BALANCE_STEPS and worst(ours, balanced.losses) <= AGAINST_TRANSFORMERS
    assert worst(logged, balanced.balances) <= AGAINST_TRANSFORMERS


def test_a_model_without_experts_has_no_auxiliary_loss(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train.aux_loss=0.1 is for models with experts"):
        ranks.run(train_toy, recipe(toys["e2b"], tmp_path, 2), ["train.aux_loss=0.1"], world_size=1)


def assert_rates(geometry: Geometry, lines: list[dict[str, float]]) -> None:
    """What a line says beside loss, rate and norm."""
    for line in lines:
        assert line["tflops_per_device"] > 0 and line["memory_gb"] > 0.1 and 0.7 < line["data_efficiency"] < 1
        assert line["mfu"] == pytest.approx(line["tflops_per_device"] / PEAK_TFLOPS)
        if geometry.moe is not None:
            loads = [line[f"expert_load/{expert}"] for expert in range(geometry.moe.num_experts)]
            assert sum(loads) == pytest.approx(len(loads))
            assert line["expert_load_min"] <= min(loads) < 1 < max(loads) <= line["expert_load_max"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_alike(
    ranks: RankPool, toys: Toys, tmp_path: Path, record_property: Any, name: str
) -> None:
    variant, world, overrides = LAYOUTS[name]
    # The schedule of the 30 steps, left after the first of them by a signal.
    leave = Trouble(LAYOUT_STEPS, 0, signal.SIGTERM)
    outcomes = ranks.run(train_toy, toys.recipe(variant, tmp_path), overrides, leave, world_size=world, timeout_s=180)
    assert outcomes == [(True, LAYOUT_STEPS)] * world
    ours = losses(tmp_path)
    assert len(ours) == LAYOUT_STEPS
    record_property("worst", worst(ours, toys.plain(variant).losses))
    assert worst(ours, toys.plain(variant).losses) <= AGAINST_TRANSFORMERS


RESUMED = {
    "e2b": [(1, []), (2, []), (2, TP2), (2, PP2), (2, [*PP2, "parallel.vpp=2"]), (2, CP2)],
    "26b-a4b": [(2, ["parallel.ep=2"]), (1, []), (2, [*TP2, "parallel.ep=2"]), (2, []), (2, ["parallel.etp=2"])],
}


@pytest.mark.parametrize("variant", RESUMED)
def test_resumed_in_other_layouts(
    ranks: RankPool, toys: Toys, tmp_path: Path, record_property: Any, variant: str
) -> None:
    """From layout to layout, two steps in each."""
    said = toys.recipe(variant, tmp_path)
    for turn, (world, overrides) in enumerate(RESUMED[variant], 1):
        leave = Trouble(2 * turn, 0, signal.SIGTERM)
        assert ranks.run(train_toy, said, overrides, leave, world_size=world, timeout_s=180)[0] == (True, 2 * turn)
    record_property("worst", worst(losses(tmp_path), toys.plain(variant).losses))
    assert worst(losses(tmp_path), toys.plain(variant).losses) <= ANOTHER_LAYOUT


def test_exports_what_it_trained(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    from bridge.convert.export import export_hf
    from bridge.hf.folder import HfFolder

    toy, run = toys["e4b"], tmp_path / "run"
    said = toys.recipe("e4b", run, 2)
    overrides = [*TP2, "train.eval_every=1", f"export.hf={tmp_path / 'live'}", "model.freeze=[embeddings]"]
    ranks.run(train_toy, said, overrides, world_size=2)
    export_hf(run, tmp_path / "exported")
    ranks.run(
        train_toy,
        said | {"model": {"megatron": str(run), "dtype": "float32"}, "output": str(tmp_path / "more")},
        [],
        world_size=1,
    )
    names = {path.name for path in toy.iterdir() if path.suffix != ".safetensors"}
    assert names <= {path.name for path in (tmp_path / "exported").iterdir()}
    with HfFolder(toy) as before, HfFolder(tmp_path / "live") as live, HfFolder(tmp_path / "exported") as after:
        assert set(before.tensors) == set(after.tensors) == set(live.tensors)
        changed = set()
        for name in before.tensors:
            old, now, also = (_bytes(folder, name) for folder in (before, after, live))
            assert now == also, name
            changed |= {name} if old != now else set()
    trained = [name for name in before.tensors if "language_model.layers." in name and ".mlp." in name]
    frozen = [name for name in before.tensors if "embed_tokens" in name or "tower" in name]
    assert trained and frozen and changed.issuperset(trained) and not changed.intersection(frozen)
    evaluated = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines() if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [1, 2]
    assert evaluated[1]["eval_loss"] < evaluated[0]["eval_loss"]


def test_a_run_from_a_checkpoint_of_another_dtype_exports_its_own(
    ranks: RankPool, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """Of float32 from 16 bits: trained weights, carried tensors and config, written live and by `export`."""
    from bridge.convert.export import export_hf
    from bridge.convert.folders import import_hf
    from bridge.hf.folder import HfFolder

    import_hf(toy("e2b", dtype="bfloat16"), tmp_path / "imported")
    said = recipe(tmp_path, tmp_path / "run", 2) | {
        "model": {"megatron": str(tmp_path / "imported"), "dtype": "float32"}
    }
    ranks.run(train_toy, said, [f"export.hf={tmp_path / 'live'}"], world_size=1)
    export_hf(tmp_path / "run", tmp_path / "exported")
    with HfFolder(tmp_path / "live") as live, HfFolder(tmp_path / "exported") as exported:
        assert {tensor.dtype for folder in (live, exported) for tensor in folder.tensors.values()} == {"F32"}
        assert list(live.tensors) == list(exported.tensors)
        assert [n for n in live.tensors if _bytes(live, n) != _bytes(exported, n)] == []
    for folder in ("live", "exported"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == "float32"


def _bytes(folder: Any, name: str) -> bytes:
    import numpy as np

    from bridge.hf.tensors import ITEM_SIZES, num_rows

    tensor = folder.tensors[name]
    size = ITEM_SIZES[tensor.dtype]
    for extent in tensor.shape:
        size *= extent
    buffer = np.empty(size, dtype=np.uint8)
    folder.read_rows(name, 0, num_rows(tensor.shape), buffer)
    return buffer.tobytes()


def bad_loss(said: dict[str, Any], overrides: list[str], bad_steps: list[int]) -> None:
    """Train with gradients that are not numbers in some steps."""
    from recipes.train import loop

    real, count = loop.update, itertools.count(1)

    def update(run: Any, *given: Any) -> tuple[float, bool]:
        if next(count) in bad_steps:
            run.models[0].decoder.layers[0].mlp.linear_fc2.weight.main_grad.fill_(float("nan"))
        return real(run, *given)

    loop.update = update
    try:
        train_toy(said, overrides)
    finally:
        loop.update = real


def test_a_step_that_is_not_a_number_is_left_out(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    ranks.run(bad_loss, toys.recipe("e2b", tmp_path / "one", 5), [], [3], world_size=1)
    lines = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert [line.get("skipped", 0) for line in lines] == [0, 0, 1, 0, 0] and lines[2]["grad_norm"] == "nan"
    assert lines[4]["loss"] < lines[0]["loss"]
    with pytest.raises(TrainingError, match="step 4: 3 updates in a row"):
        ranks.run(bad_loss, toys.recipe("e2b", tmp_path / "many", 5), [], [2, 3, 4], world_size=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.freeze=[routr]"], "'routr' names no parameter"),
        (["parallel.pp=9"], "1 ranks are no multiple of tp × cp × pp"),
        (["train.eval_every=1", "model.hf=nowhere"], "nowhere"),
        (["export.hf=/proc/1"], "does not look like a checkpoint alone"),
    ],
)
def test_refused(ranks: RankPool, toys: Toys, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        ranks.run(train_toy, toys.recipe("e2b", tmp_path / "run", 2), overrides, world_size=1)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    ranks.run(train_toy, toys.recipe("e2b", tmp_path, 1), [], world_size=1)
    with pytest.raises(UsageError, match="holds a run's checkpoints"):
        ranks.run(train_toy, toys.recipe("e2b", tmp_path, 1), ["checkpoint.resume=false"], world_size=1)


def test_another_model_does_not_resume(ranks: RankPool, toys: Toys, tmp_path: Path) -> None:
    ranks.run(train_toy, toys.recipe("e2b", tmp_path, 1), [], world_size=1)
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(BridgeError, match=r"iter_0000001|in no mapping table|shape"):
        ranks.run(train_toy, toys.recipe("31b", tmp_path, 2), [], world_size=1)
