"""LoRA here against PEFT on transformers: the same adapters, gradients and losses, in every layout."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest

from bridge.geometry import Geometry
from bridge.ranks import RankPool
from bridge.verify.media import media_sample

from .conftest import Toy
from .lora_kit import Result, Training, compare, our_training, peft_training, threads, whole_spec

STEPS, FEW = 30, 3
LOSSES, FACTORS, GRADIENTS = 1e-4, 1e-4, 1e-4
VARIANTS = ("e2b", "e4b", "12b", "26b-a4b", "31b")
# Pictures and adapters with which no routing decision is a tie, in 30 steps and in a few: see `Plain.margin`.
SEEDS = {("26b-a4b", STEPS): 20, ("26b-a4b", FEW): 2}
SP2 = {"tp": 2, "sequence_parallel": True}
# What text trains.
TEXT = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# Adapters whose blocks get no gradient of their input: embeddings are frozen, and nothing before is adapted.
DENSE_ONLY = r".*language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj"


class Trainings:
    """What is trained, and what PEFT makes of it, each once."""

    def __init__(self, ranks: RankPool, toy: Toy) -> None:
        self._ranks, self._toy = ranks, toy
        self._theirs: dict[tuple[Any, ...], Result] = {}

    def training(self, variant: str, steps: int, rows: int, **options: Any) -> Training:
        """All that can have an adapter; `rows` of a batch: an image, and audio or another image; 0: one of text."""
        toy, seed = self._toy(variant), SEEDS.get((variant, steps), 1)
        geometry = Geometry.from_folder(toy)
        kinds = ("image", "image" if geometry.audio is None else "audio")[:rows] if rows else ("text",)
        samples = [media_sample(toy, geometry, seed, kinds)]
        return Training(toy, whole_spec(geometry, **options), samples, steps, moved=True, seed=seed)

    def compared(
        self, variant: str, steps: int, rows: int, parallel: dict[str, Any], world: int, **options: Any
    ) -> dict[str, Any]:
        training = self.training(variant, steps, rows, **options)
        key = (variant, steps, rows, str(options))
        if key not in self._theirs:
            self._theirs[key] = self._ranks.run(peft_training, training, world_size=1, timeout_s=180)[0]
        theirs = self._theirs[key]
        assert theirs.margin > 1e-5, "a tie in the router: take another seed"
        ours = self._ranks.run(our_training, training, parallel, 1, world_size=world, timeout_s=180)[0]
        assert len(ours.losses) == steps
        assert steps < STEPS or ours.losses[-1] < 0.6 * ours.losses[0]
        return compare(ours, theirs)


@pytest.fixture(scope="module")
def trainings(ranks: RankPool, toy: Toy) -> Trainings:
    return Trainings(ranks, toy)


def check(found: dict[str, Any], record_property: Any) -> None:
    record_property("worst", str(found))
    assert found["loss"] <= LOSSES and found["norm"] <= 10 * LOSSES, found
    assert found["gradients"][0] <= GRADIENTS and found["trained"][0] <= FACTORS, found


def rows_of(variant: str) -> int:
    # Fewer tokens, fewer routing decisions, fewer ties.
    return 1 if variant == "26b-a4b" else 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_the_adapter_of_peft(trainings: Trainings, record_property: Any, variant: str) -> None:
    check(trainings.compared(variant, STEPS, rows_of(variant), {}, 1), record_property)


@pytest.mark.parametrize(
    ("variant", "world", "parallel"),
    [
        ("e2b", 2, SP2),
        ("e4b", 2, {"pp": 2}),
        ("26b-a4b", 2, {**SP2, "ep": 2}),
        ("12b", 2, {"cp": 2}),
        ("31b", 2, {}),
    ],
    ids=["e2b TP2+SP", "e4b PP2", "26b TP2+SP EP2", "12b CP2", "31b DP2"],
)
def test_trains_it_in_layouts(
    trainings: Trainings, record_property: Any, variant: str, world: int, parallel: dict[str, Any]
) -> None:
    check(trainings.compared(variant, STEPS, rows_of(variant), parallel, world), record_property)


LAYOUTS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "e2b TP2": ("e2b", 2, {"tp": 2}),
    "e2b PP2 VPP2": ("e2b", 2, {"pp": 2, "vpp": 2}),
    "e2b DP2, overlap": ("e2b", 2, {"overlap": True}),
    "e2b TP2+SP PP2, full recompute": ("e2b", 4, {**SP2, "pp": 2, "recompute": "full"}),
    # More ranks than query groups.
    "12b TP4+SP": ("12b", 4, {"tp": 4, "sequence_parallel": True}),
    "12b TP2": ("12b", 2, {"tp": 2}),
    "26b TP2+SP": ("26b-a4b", 2, SP2),
    "26b EP2": ("26b-a4b", 2, {"ep": 2}),
    "26b EP2 allgather": ("26b-a4b", 2, {"ep": 2, "dispatcher": "allgather"}),
    "26b ETP2": ("26b-a4b", 2, {"etp": 2}),
    "26b TP2+SP EP2 ETP2": ("26b-a4b", 4, {**SP2, "ep": 2, "etp": 2}),
    "26b CP2 EP2": ("26b-a4b", 2, {"cp": 2, "ep": 2}),
    "26b EP2 PP2": ("26b-a4b", 4, {"pp": 2, "ep": 2}),
    "26b, selective recompute": ("26b-a4b", 1, {"recompute": "selective", "recompute_modules": ["moe", "mlp"]}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_its_gradients(trainings: Trainings, record_property: Any, name: str) -> None:
    variant, world, parallel = LAYOUTS[name]
    check(trainings.compared(variant, FEW, 2, parallel, world), record_property)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted through /proc")
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_training_leaves_nothing_behind(trainings: Trainings, ranks: RankPool, dispatcher: str) -> None:
    """Of its process groups, each of which has threads: so no more of them after the third than after the first."""
    counts = []
    for _ in range(3):
        layout = {"ep": 2, "dispatcher": dispatcher}
        ranks.run(our_training, trainings.training("26b-a4b", 1, 2), layout, 1, world_size=2)
        counts.append(max(ranks.run(threads, world_size=2)))
    assert counts[2] <= counts[0], counts


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, {"recompute": "full"}),
        (1, {"recompute": "selective", "recompute_modules": ["mlp"]}),
        (2, {"pp": 2}),
    ],
    ids=["full", "selective", "PP2"],
)
def test_frozen_embeddings_do_not_cut_adapters_off(
    trainings: Trainings, record_property: Any, world: int, parallel: dict[str, Any]
) -> None:
    """Rank-stabilised scaling too, while at it."""
    found = trainings.compared("31b", FEW, 2, parallel, world, targets=DENSE_ONLY, rslora=True)
    check(found, record_property)


def test_drops_what_peft_drops(trainings: Trainings, record_property: Any) -> None:
    """One row of text: then [s, b, h] and [b, s, h] take the same random numbers in the same order."""
    check(trainings.compared("31b", FEW, 0, {}, 1, targets=TEXT, dropout=0.25), record_property)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_drops_by_pattern(trainings: Trainings, record_property: Any, dora: bool) -> None:
    """As `test_drops_what_peft_drops`; DoRA multiplies what is left by the base as well."""
    pattern = {r"mlp\.\w+_proj": 0.0, "o_proj": 0.4}
    options = {"targets": TEXT, "dropout": 0.25, "dropout_pattern": pattern, "dora": dora}
    check(trainings.compared("31b", FEW, 0, {}, 1, **options), record_property)


WITH_TABLES = r".*language_model\.(embed_tokens(_per_layer)?|per_layer_model_projection|layers\.\d+\.mlp\.down_proj)"
EMBEDDINGS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "one": (1, {}, False),
    "TP2+SP PP2": (4, {**SP2, "pp": 2}, False),
    "TP2, DoRA": (2, {"tp": 2}, True),
    "TP2+SP PP2, DoRA": (4, {**SP2, "pp": 2}, True),
    "PP2 VPP2, DoRA": (2, {"pp": 2, "vpp": 2}, True),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_adapters_of_embeddings(trainings: Trainings, record_property: Any, name: str) -> None:
    """Of the scaled tables and their padding row, beside a head that stays the base's."""
    world, parallel, dora = EMBEDDINGS[name]
    found = trainings.compared("e2b", FEW, 2, parallel, world, targets=WITH_TABLES, dora=dora)
    check(found, record_property)


def test_trains_the_magnitudes_of_peft(trainings: Trainings, record_property: Any) -> None:
    """DoRA on all linears of text, vision and audio.

    Not on 12B: at this rate its gradients grow again after 20 steps, and whatever differs doubles with every step.
    """
    check(trainings.compared("e2b", STEPS, 2, {}, 1, dora=True), record_property)


# Too small to drop anything, but what is dropped goes another way.
HARDLY = {"dropout": 1e-9}
DORA: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "e2b TP2+SP PP2, dropout": ("e2b", 4, {**SP2, "pp": 2}, HARDLY),
    "12b TP2, full recompute, dropout": ("12b", 2, {"tp": 2, "recompute": "full"}, HARDLY),
    "12b CP2, dropout": ("12b", 2, {"cp": 2}, HARDLY),
    "26b TP2+SP EP2, whole modules": ("26b-a4b", 2, {**SP2, "ep": 2}, {"modules_to_save": ("router", "experts")}),
}


@pytest.mark.parametrize("name", DORA)
def test_magnitudes_in_every_layout(trainings: Trainings, record_property: Any, name: str) -> None:
    variant, world, parallel, options = DORA[name]
    found = trainings.compared(variant, FEW, 2, parallel, world, dora=True, parameters=(), **options)
    check(found, record_property)


def test_magnitudes_begin_as_norms(trainings: Trainings, ranks: RankPool, record_property: Any) -> None:
    """Each program with its own. A B that begins at zero is not compared: Adam makes steps of its noise."""
    training = replace(trainings.training("12b", 1, 1, dora=True), moved=False)
    theirs = ranks.run(peft_training, training, world_size=1)[0]
    ours = ranks.run(our_training, training, {"tp": 2}, 1, world_size=2)[0]
    for result in (ours, theirs):
        result.trained = {name: t for name, t in result.trained.items() if name.endswith(".lora_magnitude")}
    assert theirs.trained
    check(compare(ours, theirs), record_property)


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (4, {**SP2, "pp": 2})], ids=["one", "TP2+SP PP2"])
def test_modules_to_save(trainings: Trainings, record_property: Any, world: int, parallel: dict[str, Any]) -> None:
    """Trained whole, beside adapters of what is left: an embedding with its tied head, a projector, norms."""
    saved = ("embed_tokens", "embed_tokens_per_layer", "embed_vision", "norm")
    found = trainings.compared("e4b", FEW, 2, parallel, world, targets=TEXT, modules_to_save=saved)
    check(found, record_property)


@pytest.mark.parametrize("variant", ["12b", "e4b"])
def test_some_projections_of_a_fused_linear(trainings: Trainings, record_property: Any, variant: str) -> None:
    """Q, up and PLE linears only, at as many ranks as split a query group of 12B."""
    layer = r"(self_attn\.q_proj|mlp\.up_proj|per_layer_projection)"
    targets = rf".*language_model\.(layers\.\d+\.{layer}|per_layer_model_projection)"
    layout = {"tp": 4} if variant == "12b" else {**SP2, "pp": 2}
    check(trainings.compared(variant, FEW, 1, layout, 4, targets=targets), record_property)
