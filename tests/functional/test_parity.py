"""Logits and gradients against transformers: every variant, every layout, with and without recompute."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import ParallelError
from bridge.geometry import Geometry
from bridge.megatron.layout import check_layout
from bridge.megatron.parallel import Parallel, initialize
from bridge.ranks import RankPool
from bridge.toy import VARIANTS
from bridge.verify.on_ranks import run, run_reference
from bridge.verify.result import Check
from bridge.verify.sample import random_sample
from bridge.verify.task import ParityTask

from .conftest import References, Toy

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PAIRS = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2}
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}

DENSE_LAYOUTS = {
    "1 rank": Parallel(),
    "TP2+SP": Parallel(tp=2, sequence_parallel=True),
    "PP2": Parallel(pp=2),
    "PP2 VPP2": Parallel(pp=2, vpp=2),
    "TP2+SP PP2": Parallel(tp=2, pp=2, sequence_parallel=True),
    # Fewer K/V heads than ranks in E2B and E4B everywhere, and in global layers of 12B and 26B.
    "TP4+SP": Parallel(tp=4, sequence_parallel=True),
}
EXPERT_LAYOUTS = {
    "EP2": Parallel(ep=2),
    "TP2+SP EP2": Parallel(tp=2, ep=2, sequence_parallel=True),
    "TP2+SP ETP2": Parallel(tp=2, etp=2, sequence_parallel=True),
}


def compare(
    ranks: RankPool,
    references: References,
    folder: Path,
    parallel: Parallel,
    *,
    dtype: torch.dtype = torch.float32,
    world_size: int | None = None,
    **changes: Any,
) -> list[Check]:
    """The rows of one comparison, all ranks together."""
    files = {"dtype": references.file(folder, dtype)}
    if dtype is not torch.float32:
        files["float32"] = references.file(folder)
    geometry = Geometry.from_folder(folder)
    task = ParityTask(folder.name, geometry, folder, False, parallel, dtype, references.sample(folder), files)
    task = replace(task, **changes)
    results = ranks.run(run, task, world_size=world_size or parallel.world_size)
    return [check for rank in results for check in rank]


def assert_passed(checks: list[Check], *metrics: str) -> None:
    failed = [f"{c.name} {c.metric} = {c.value:.3g} > {c.bound:.0e} ({c.detail})" for c in checks if not c.passed]
    assert not failed, failed
    bounded = {f"{check.name} {check.metric}" for check in checks if check.bound is not None}
    assert bounded == set(metrics), "not everything was compared"


@pytest.mark.parametrize("recompute", [None, FULL], ids=["stored", "recomputed"])
@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_layouts(
    ranks: RankPool, references: References, toy: Toy, variant: str, layout: str, recompute: dict[str, Any] | None
) -> None:
    checks = compare(ranks, references, toy(variant), DENSE_LAYOUTS[layout], overrides=recompute or {})
    assert_passed(checks, "logits relative", "gradients relative")


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["stored", "recomputed"])
@pytest.mark.parametrize("dispatcher", [{}, ALLGATHER], ids=["alltoall", "allgather"])
@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_expert_layouts(
    ranks: RankPool,
    references: References,
    toy: Toy,
    layout: str,
    dispatcher: dict[str, Any],
    recompute: dict[str, Any],
) -> None:
    overrides = dispatcher | recompute
    checks = compare(ranks, references, toy("26b-a4b"), EXPERT_LAYOUTS[layout], overrides=overrides)
    assert_passed(checks, "logits relative", "gradients relative")


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_parallel_alone_and_data_parallel(
    ranks: RankPool, references: References, toy: Toy, variant: str
) -> None:
    """TP without sequence parallelism (with experts Megatron refuses it), and two data-parallel ranks."""
    folder = toy(variant)
    if Geometry.from_folder(folder).moe is None:
        assert_passed(compare(ranks, references, folder, Parallel(tp=2)), "logits relative", "gradients relative")
    assert_passed(compare(ranks, references, folder, Parallel(), world_size=2), "logits relative", "gradients relative")


@pytest.mark.parametrize("overrides", [PAIRS, BLOCK, SELECTIVE], ids=["pairs", "block", "selective"])
@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_other_recompute(
    ranks: RankPool, references: References, toy: Toy, variant: str, overrides: dict[str, Any]
) -> None:
    """Shared K/V cross the borders of recomputed groups in E2B."""
    if variant == "26b-a4b" and overrides is SELECTIVE:
        overrides = SELECTIVE | {"recompute_modules": ["core_attn", "mlp", "moe"]}
    checks = compare(ranks, references, toy(variant), Parallel(pp=2), overrides=overrides)
    assert_passed(checks, "logits relative", "gradients relative")


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 4], ids=["whole rows", "padded rows"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_the_length_that_other_attention_is_chosen_for(
    ranks: RankPool, toy: Toy, tmp_path: Path, variant: str, rows: int
) -> None:
    """On a CPU: bands for windows, and for global layers torch's causal kernel, or tiles where rows are padded."""
    folder, file = toy(variant), tmp_path / "reference.safetensors"
    geometry = Geometry.from_folder(folder)
    # With seed 0 the experts that a token of 26B is routed to last and not any more are 1.4e-6 apart in their logits:
    # transformers and every backend here, the reference too, then choose differently.
    sample = random_sample(geometry, seed=1, batch=rows, multiple_of=304)
    ranks.run(run_reference, folder, sample, torch.float32, True, file, world_size=1)
    task = ParityTask(variant, geometry, folder, False, Parallel(), torch.float32, sample, {"dtype": file})
    (checks,) = ranks.run(run, replace(task, micro_batch_size=min(rows, 2)), world_size=1)
    assert_passed(checks, "logits relative", "gradients relative")


@pytest.mark.parametrize("layout", ["1 rank", "TP2+SP", "PP2 VPP2"])
@pytest.mark.parametrize("variant", ["e2b", "12b", "26b-a4b"])
def test_untied_text_models(ranks: RankPool, references: References, toy: Toy, variant: str, layout: str) -> None:
    folder = toy(variant, untied=True, text_only=True)
    checks = compare(ranks, references, folder, DENSE_LAYOUTS[layout])
    assert_passed(checks, "logits relative", "gradients relative")


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16(ranks: RankPool, references: References, toy: Toy, variant: str) -> None:
    """26B's difference has a name: transformers rounds the sum over experts to bf16 after each, Megatron once."""
    folder = toy(variant, dtype="bfloat16")
    checks = compare(ranks, references, folder, Parallel(), dtype=torch.bfloat16)
    assert_passed(checks, "logits kl")
    own = [check.value for check in checks if "transformers' own" in check.detail]
    assert own and own[0] > 0, "the float32 run beside it is missing"


def provided_in_other_groups(folder: Path, made: Parallel, wanted: Parallel) -> str:
    """On a rank: what the provider of one layout says to Megatron's groups of another."""
    from bridge.megatron.provider import Gemma4Provider

    initialize(made)
    try:
        Gemma4Provider(Geometry.from_folder(folder), wanted, torch.float32).provide()
    except ParallelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("made", "wanted", "said"),
    [
        (Parallel(ep=2), Parallel(), "ep=1: Megatron's groups were made with ep=2"),
        (Parallel(tp=2, sequence_parallel=True), Parallel(tp=2, etp=2, sequence_parallel=True), "etp=2: .* etp=1"),
        (Parallel(), Parallel(cp=2), "cp=2: .* cp=1"),
        (Parallel(ep=2), Parallel(ep=2), "^$"),
    ],
)
def test_groups_of_another_layout_are_refused(
    ranks: RankPool, toy: Toy, made: Parallel, wanted: Parallel, said: str
) -> None:
    for message in ranks.run(provided_in_other_groups, toy("26b-a4b"), made, wanted, world_size=2):
        assert re.search(said, message), message


# --- each of these must be caught -------------------------------------------------------------------------------------


def _layers(geometry: Geometry, **changes: Any) -> Geometry:
    return replace(geometry, layers=tuple(replace(layer, **changes) for layer in geometry.layers))


def _global_layers(geometry: Geometry, **changes: Any) -> Geometry:
    layers = (replace(layer, **changes) if layer.kind == "global" else layer for layer in geometry.layers)
    return replace(geometry, layers=tuple(layers))


def _shift_producer(geometry: Geometry) -> Geometry:
    layers = list(geometry.layers)
    for i, layer in enumerate(layers):
        if layer.shares_kv and layer.kind == "sliding":
            layers[i] = replace(layer, kv_source=layer.kv_source - 1)
    return replace(geometry, layers=tuple(layers))


MUTATIONS = {
    "rope over the whole global head": ("e2b", lambda g: _global_layers(g, rotary_fraction=1.0)),
    "another rope base": ("31b", lambda g: _global_layers(g, rope_theta=10_000.0)),
    "a window one token wider": (
        "e4b",
        lambda g: replace(g, layers=tuple(replace(la, window=la.window + 1) if la.window else la for la in g.layers)),
    ),
    "no softcap": ("12b", lambda g: replace(g, logit_softcap=None)),
    "K/V of the layer before": ("e2b", _shift_producer),
    "one expert fewer": ("26b-a4b", lambda g: replace(g, moe=replace(g.moe, topk=g.moe.topk - 1))),
    "another epsilon": ("31b", lambda g: replace(g, rms_norm_eps=1e-3)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_model_is_caught(ranks: RankPool, references: References, toy: Toy, name: str) -> None:
    variant, mutate = MUTATIONS[name]
    folder = toy(variant)
    geometry = mutate(Geometry.from_folder(folder))
    checks = compare(ranks, references, folder, Parallel(), geometry=geometry)
    assert {check.name for check in checks if not check.passed} == {"logits", "gradients"}


def run_with_wrong_stack(task: ParityTask) -> list[Check]:
    """On a rank: as if the table said [up; gate]."""
    from bridge.mapping import transforms
    from bridge.mapping.text import TEXT

    row = next(row for row in TEXT if row.transform is transforms.stack)
    object.__setattr__(row, "hf", row.hf[::-1])
    try:
        return run(task)
    finally:
        object.__setattr__(row, "hf", row.hf[::-1])


def run_with_gradient_for_padding(task: ParityTask) -> list[Check]:
    """On a rank: as if a lookup of the padding row gave a gradient."""
    return run(replace(task, geometry=replace(task.geometry, pad_token_id=None)))


def float32_task(folder: Path, references: References) -> ParityTask:
    """On one rank."""
    files = {"dtype": references.file(folder)}
    geometry, sample = Geometry.from_folder(folder), references.sample(folder)
    return ParityTask(folder.name, geometry, folder, False, Parallel(), torch.float32, sample, files)


def test_swapped_gate_and_up_are_caught(ranks: RankPool, references: References, toy: Toy) -> None:
    folder = toy("31b")
    task = float32_task(folder, references)
    (checks,) = ranks.run(run_with_wrong_stack, task, world_size=1)
    assert {check.name for check in checks if not check.passed} == {"logits", "gradients"}


def test_a_gradient_for_the_padding_row_is_caught(ranks: RankPool, references: References, toy: Toy) -> None:
    folder = toy("e2b")
    task = float32_task(folder, references)
    (checks,) = ranks.run(run_with_gradient_for_padding, task, world_size=1)
    failed = [check for check in checks if not check.passed]
    assert [check.name for check in failed] == ["gradients"], "padding positions are masked out of the logits"
    assert "embed_tokens" in failed[0].detail


@pytest.mark.parametrize(
    ("variant", "sizes", "named"),
    [
        ("e2b", {"tp": 3}, "tp=3 does not divide .*; tp=1, 2, 4, 8 would fit"),
        ("e2b", {"pp": 6, "vpp": 2}, "12 pipeline stages"),
        ("e2b", {"ep": 2}, "ep=2: this model has no experts; ep=1 would fit"),
        ("31b", {"etp": 2}, "etp=2: this model has no experts; etp=1 would fit"),
        ("26b-a4b", {"ep": 3}, "ep=3 does not divide 8 experts; ep=1, 2, 4, 8 would fit"),
        ("26b-a4b", {"tp": 2}, "sequence_parallel"),
        ("26b-a4b", {"etp": 5}, "etp=5 .*; etp=1, 2, 3, 4, 6, 8, 12, 24 would fit"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(toy: Toy, variant: str, sizes: dict[str, int], named: str) -> None:
    with pytest.raises(ParallelError, match=named):
        check_layout(Geometry.from_folder(toy(variant)), Parallel(**sizes))
