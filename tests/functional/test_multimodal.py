"""The multimodal model against transformers: logits and gradients, every modality and mix, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.errors import ParallelError
from bridge.geometry import Geometry, LayerGeometry
from bridge.megatron.parallel import Parallel
from bridge.megatron.visibility import FORWARD, GENERATE, MaskRule
from bridge.ranks import RankPool
from bridge.toy import VARIANTS, write_toy
from bridge.verify.media import kinds_of, media_sample
from bridge.verify.parity import LOGITS_RELATIVE, ParityTask, run_parity
from bridge.verify.reference import LOGITS, compute_reference, load_hf, with_masks
from bridge.verify.result import Check
from bridge.verify.sample import IGNORE, VerificationSample

pytest.importorskip("torchvision", reason="transformers' Gemma 4 processors need torchvision")


@dataclass(frozen=True)
class Toy:
    folder: Path
    geometry: Geometry
    samples: dict[tuple[str, ...], tuple[VerificationSample, Path]] = field(default_factory=dict)

    def sample(
        self, kinds: tuple[str, ...] | None = None, vision_mask: str = GENERATE
    ) -> tuple[VerificationSample, Path]:
        """A batch and what transformers makes of it under its `vision_mask`, computed once."""
        kinds = kinds or kinds_of(self.geometry)
        key = (*kinds, vision_mask)
        if key not in self.samples:
            sample = media_sample(self.folder, self.geometry, seed=3, kinds=kinds)
            reference = self.folder.parent / f"{self.folder.name}{len(self.samples)}.safetensors"
            compute_reference(self.folder, sample, torch.float32, True, reference, vision_mask)
            self.samples[key] = sample, reference
        return self.samples[key]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Toy]:
    root = tmp_path_factory.mktemp("toys")
    for variant in VARIANTS:
        write_toy(variant, root / variant, dtype="float32")
    return {variant: Toy(root / variant, Geometry.from_folder(root / variant)) for variant in VARIANTS}


def parity(
    toy: Toy,
    ranks: RankPool,
    parallel: Parallel,
    kinds: tuple[str, ...] | None = None,
    world: int = 0,
    run: Callable[[ParityTask], list[Check]] = run_parity,
    batch: tuple[VerificationSample, Path] | None = None,
    **options: Any,
) -> list[Check]:
    """`batch`: in the place of what `Toy.sample` gives for `kinds`."""
    sample, reference = batch or toy.sample(kinds)
    task = ParityTask(
        toy.folder.name,
        toy.geometry,
        toy.folder,
        False,
        parallel,
        torch.float32,
        sample,
        {"dtype": reference},
        **options,
    )
    rows = ranks.run(run, task, world_size=world or parallel.world_size)
    checks = [check for rank in rows for check in rank]
    for check in checks:
        if check.bound is not None:
            print(check.variant, check.parallel, check.name, check.metric, f"{check.value:.2e}", check.detail)
    return checks


def assert_passed(checks: list[Check]) -> None:
    assert {"logits", "gradients"} <= {check.name for check in checks}
    for check in checks:
        assert check.passed, check


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_modality(variant: str, toys: dict[str, Toy], ranks: RankPool) -> None:
    assert_passed(parity(toys[variant], ranks, Parallel()))


LAYOUTS = {
    "TP2+SP": Parallel(tp=2, sequence_parallel=True),
    "PP2": Parallel(pp=2),
    "TP2+SP PP2": Parallel(tp=2, pp=2, sequence_parallel=True),
}


def mixed(toy: Toy) -> tuple[str, str]:
    """A row with as much as the model takes, and one of text alone."""
    return ("image, audio, text" if toy.geometry.audio is not None else "two images"), "text"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts(variant: str, layout: str, toys: dict[str, Toy], ranks: RankPool) -> None:
    toy = toys[variant]
    assert_passed(parity(toy, ranks, LAYOUTS[layout], mixed(toy), micro_batch_size=1))


def test_tp_without_sequence_parallel(toys: dict[str, Toy], ranks: RankPool) -> None:
    toy = toys["e2b"]
    assert_passed(parity(toy, ranks, Parallel(tp=2), mixed(toy)))


def test_a_tower_whose_heads_do_not_divide_is_replicated(toys: dict[str, Toy], ranks: RankPool) -> None:
    folder = toys["31b"].folder.parent / "odd"
    write_toy_with_odd_heads(folder)
    toy = Toy(folder, Geometry.from_folder(folder))
    assert_passed(parity(toy, ranks, Parallel(tp=2, sequence_parallel=True), mixed(toy)))


def write_toy_with_odd_heads(folder: Path) -> None:
    """A 31B toy whose vision tower has three heads."""
    from bridge.toy import config

    smaller = config._SMALLER["vision_config"]
    before = dict(smaller)
    smaller |= {"num_attention_heads": 3, "num_key_value_heads": 3}
    try:
        write_toy("31b", folder, dtype="float32")
    finally:
        smaller.clear()
        smaller.update(before)


# Every row with another mix of images and frames. Packed, a micro batch is the documents of one row.
SEEN = ("two images", "image, video", "two videos", "text")
SEEN_LAYOUTS = {
    "PP2 VPP2": (Parallel(pp=2, vpp=2), False),
    "CP2": (Parallel(cp=2), False),
    "packed": (Parallel(), True),
    "TP2+SP PP2 packed": (Parallel(tp=2, pp=2, sequence_parallel=True), True),
    "CP2 packed": (Parallel(cp=2), True),
}
MORE_LAYOUTS = {
    "1 rank": (Parallel(), False),
    "TP2": (Parallel(tp=2), False),
    "TP2+SP": (Parallel(tp=2, sequence_parallel=True), False),
    "PP2": (Parallel(pp=2), False),
    "TP2+SP PP2": (Parallel(tp=2, pp=2, sequence_parallel=True), False),
    "TP2+SP CP2": (Parallel(tp=2, cp=2, sequence_parallel=True), False),
    "TP2+SP packed": (Parallel(tp=2, sequence_parallel=True), True),
    "PP2 packed": (Parallel(pp=2), True),
    "PP2 VPP2 packed": (Parallel(pp=2, vpp=2), True),
    "TP2+SP CP2 packed": (Parallel(tp=2, cp=2, sequence_parallel=True), True),
}


@pytest.mark.parametrize(
    "layout", [*SEEN_LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_LAYOUTS)]
)
def test_images_and_video_in_every_layout(layout: str, toys: dict[str, Toy], ranks: RankPool) -> None:
    """12B, under transformers' own masks of generation."""
    parallel, packed = (SEEN_LAYOUTS | MORE_LAYOUTS)[layout]
    micro = 2 if packed and parallel.vpp == 1 else 1
    assert_passed(parity(toys["12b"], ranks, parallel, SEEN, packed=packed, micro_batch_size=micro))


def generated(toy: Toy, kind: str, tokens: int) -> tuple[VerificationSample, Path]:
    """A row and what transformers generates after it: logits of the new tokens by its static cache, the rest by it too
    where it has them, that is by its `forward` under the masks that it makes for such a cache."""
    prompt = media_sample(toy.folder, toy.geometry, seed=3, kinds=[kind], multiple_of=1)
    model = load_hf(toy.folder, toy.geometry, torch.float32).eval()
    output = model.generate(
        **prompt.inputs(),
        cache_implementation="static",
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert type(output.cache).__name__ == "StaticCache"
    ids, length = output.sequences, prompt.input_ids.shape[1]
    types = torch.nn.functional.pad(prompt.mm_token_type_ids, (0, tokens))
    row = VerificationSample(ids, torch.ones_like(ids), torch.full_like(ids, IGNORE), types, prompt.media, prompt.names)
    reference = toy.folder.parent / f"{toy.folder.name}-generated.safetensors"
    compute_reference(toy.folder, row, torch.float32, False, reference)
    logits = load_file(reference)[LOGITS]
    logits[0, length - 1 : -1] = torch.stack(output.logits, dim=1)[0]
    save_file({LOGITS: logits}, reference)
    return row, reference


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_generates_in_a_static_cache(variant: str, toys: dict[str, Toy], ranks: RankPool) -> None:
    toy = toys[variant]
    batch = generated(toy, "image, video", 4)
    checks = parity(toy, ranks, Parallel(), batch=batch, gradients=False, micro_batch_size=1)
    assert any(check.name == "logits" and check.bound for check in checks)
    assert all(check.passed for check in checks), checks


def test_the_masks_of_forward_are_an_option(toys: dict[str, Toy], ranks: RankPool) -> None:
    """In the 12B transformers' `forward` contradicts its generation; in the others there is nothing to choose."""
    toy = toys["12b"]
    batch = toy.sample(SEEN, FORWARD)
    assert_passed(parity(toy, ranks, Parallel(), batch=batch, overrides={"vision_mask": FORWARD}))
    differs = [check for check in parity(toy, ranks, Parallel(), batch=batch) if check.metric == "relative"]
    assert max(check.value for check in differs if check.name == "logits") > 1e-2


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "12b"])
def test_forward_and_generation_agree(variant: str, toys: dict[str, Toy]) -> None:
    """transformers' own two ways to the same masks, for the classes that have one rule."""
    folder, geometry = toys[variant].folder, toys[variant].geometry
    model, row = load_hf(folder, geometry, torch.float32), media_sample(folder, geometry, 3, ["image, video"])
    with torch.no_grad():
        forward, generate = (model(**inputs).logits for inputs in (row.inputs(), with_masks(model, row.inputs())))
    assert torch.equal(forward, generate)


def test_experts_over_ranks(toys: dict[str, Toy], ranks: RankPool) -> None:
    toy = toys["26b-a4b"]
    assert_passed(parity(toy, ranks, Parallel(ep=2), mixed(toy), micro_batch_size=1))


def test_full_recompute(toys: dict[str, Toy], ranks: RankPool) -> None:
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    toy = toys["e2b"]
    assert_passed(parity(toy, ranks, Parallel(), mixed(toy), overrides=recompute))


@pytest.mark.parametrize("variant", ["e2b", "12b", "26b-a4b"])
def test_images_on_one_of_two_data_parallel_ranks(variant: str, toys: dict[str, Toy], ranks: RankPool) -> None:
    toy = toys[variant]
    options = {"micro_batch_size": 1, "overlap_grad_reduce": True, "steps": 2}
    assert_passed(parity(toy, ranks, Parallel(), mixed(toy), world=2, **options))


def parity_without_answers_for_unused_towers(task: ParityTask) -> list[Check]:
    from bridge.megatron.multimodal import Gemma4MultimodalModel

    answer = Gemma4MultimodalModel._unused
    Gemma4MultimodalModel._unused = lambda self, soft: iter(())  # type: ignore[method-assign, misc, assignment]
    try:
        return run_parity(task)
    finally:
        Gemma4MultimodalModel._unused = answer  # type: ignore[method-assign]


def test_that_data_parallel_ranks_need_the_answer_for_unused_towers(toys: dict[str, Toy], ranks: RankPool) -> None:
    toy, run = toys["e2b"], parity_without_answers_for_unused_towers
    options = {"micro_batch_size": 1, "overlap_grad_reduce": True, "steps": 2}
    with pytest.raises(ParallelError, match="AssertionError"):
        parity(toy, ranks, Parallel(), mixed(toy), world=2, run=run, **options)


# Variant, and what would be wrong with its masks: layer kind -> what tokens of a vision block see of each other.
MUTATIONS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "blocks bidirectional in a global layer": (("12b", "26b-a4b", "31b"), "global", "full"),
    "blocks causal in a sliding layer": (("12b", "26b-a4b", "31b"), "sliding", "causal"),
    "window not applied backwards in a block": (("12b", "26b-a4b", "31b"), "sliding", "full"),
    "blocks bidirectional at all": (("e2b", "e4b"), "sliding", "windowed"),
}


def parity_with_mutated_masks(task: ParityTask, kind: str, blocks: str) -> list[Check]:
    from bridge.megatron import block as block_module

    right = block_module.mask_rule

    def wrong(geometry: Geometry, layer: LayerGeometry, vision_mask: str) -> MaskRule:
        rule = right(geometry, layer, vision_mask)
        return replace(rule, blocks=blocks) if layer.kind == kind else rule  # type: ignore[arg-type]

    block_module.mask_rule = wrong  # type: ignore[attr-defined]
    try:
        return run_parity(task)
    finally:
        block_module.mask_rule = right  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "variant"), [(name, v) for name, (vs, _, _) in MUTATIONS.items() for v in vs])
def test_a_wrong_mask_shows(name: str, variant: str, toys: dict[str, Toy], ranks: RankPool) -> None:
    toy, (_, kind, blocks) = toys[variant], MUTATIONS[name]
    run = partial(parity_with_mutated_masks, kind=kind, blocks=blocks)
    checks = parity(toy, ranks, Parallel(), mixed(toy), run=run, gradients=False)
    worst = max(check.value for check in checks if check.metric == "relative")
    assert worst > 100 * LOGITS_RELATIVE, checks
