"""Masks as descriptions: the rules of each family, documents, padding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron.attention_backends.ffpa import _documents
from bridge.megatron.attention_backends.flex import block_mask
from bridge.megatron.exchange import exchange_of
from bridge.megatron.mask import mask_of
from bridge.megatron.visibility import (
    FORWARD,
    GENERATE,
    MaskRule,
    Visibility,
    check_vision_mask,
    mask_rule,
    vision_blocks,
)
from bridge.megatron.zigzag import Zigzag

VARIANTS = Path(__file__).parents[2] / "bridge" / "variants"


def geometry_of(variant: str) -> Geometry:
    return Geometry.from_dict(json.loads((VARIANTS / f"{variant}.json").read_text()))


def rules(variant: str, vision_mask: str = GENERATE) -> tuple[MaskRule, MaskRule]:
    """(sliding, global)"""
    geometry = geometry_of(variant)
    by_kind = {layer.kind: mask_rule(geometry, layer, vision_mask) for layer in geometry.layers}
    return by_kind["sliding"], by_kind["global"]


def seen(rule: MaskRule, query: int, window: int = 8) -> list[int]:
    """What a query sees of 24 tokens with a vision block at 5 to 19."""
    types = torch.zeros(1, 24, dtype=torch.long)
    types[0, 5:20] = 1
    visibility = Visibility.of(torch.zeros(1, 24, dtype=torch.long), mm_token_type_ids=types)
    narrowed = MaskRule(window if rule.window else None, rule.blocks)
    return visibility.dense(narrowed)[0, query].nonzero().flatten().tolist()


def test_sliding_layers_cut_blocks_behind_only() -> None:
    for variant in ("12b", "26b-a4b", "31b"):
        sliding, everywhere = rules(variant)
        assert seen(sliding, 5) == list(range(20))
        assert seen(sliding, 12) == list(range(5, 20))
        assert seen(sliding, 19) == list(range(12, 20))
        assert seen(everywhere, 12) == list(range(13)), "never bidirectional in global layers"


def test_forward_of_12b_sees_whole_blocks_in_every_layer() -> None:
    sliding, everywhere = rules("12b", FORWARD)
    assert seen(sliding, 19) == list(range(5, 20)), "not cut by the window"
    assert seen(everywhere, 7) == list(range(20))
    assert seen(sliding, 22) == list(range(15, 23)), "outside of a block the window holds"


def test_vision_masks_that_there_are() -> None:
    for variant in ("e2b", "e4b", "12b", "26b-a4b", "31b"):
        check_vision_mask(geometry_of(variant), GENERATE)
        if variant != "12b":
            with pytest.raises(UsageError, match=r"Gemma4ForConditionalGeneration .* leave it at generate"):
                check_vision_mask(geometry_of(variant), FORWARD)
    check_vision_mask(geometry_of("12b"), FORWARD)
    with pytest.raises(UsageError, match="vision_mask=both: is one of generate, forward"):
        check_vision_mask(geometry_of("12b"), "both")


def test_e2b_and_e4b_are_causal_everywhere() -> None:
    for variant in ("e2b", "e4b"):
        sliding, everywhere = rules(variant)
        assert seen(sliding, 12) == list(range(5, 13))
        assert seen(everywhere, 12) == list(range(13))


def test_blocks_are_maximal_runs() -> None:
    types = torch.tensor([[1, 1, 0, 2, 2, 3, 1, 0], [0, 0, 3, 3, 0, 0, 0, 0]])
    assert vision_blocks(types).tolist() == [[0, 0, -1, 1, 1, -1, 2, -1], [-1] * 8]  # type: ignore[union-attr]
    assert vision_blocks(None) is None


def test_documents_and_padding_see_nothing_of_others() -> None:
    ids = torch.zeros(1, 10, dtype=torch.long)
    packed = Visibility.of(ids, cu_seqlens=torch.tensor([0, 4, 10])).dense(MaskRule(None, "causal"))[0]
    assert packed[3].nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert packed[5].nonzero().flatten().tolist() == [4, 5]
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    padded = Visibility.of(ids, mask).dense(MaskRule(None, "causal"))[0]
    assert not padded[:7, 7:].any() and not padded[7:, :7].any()
    assert padded.diagonal().all(), "no row is empty: a softmax over nothing is NaN"


def test_other_masks_are_refused() -> None:
    ids = torch.zeros(2, 10, dtype=torch.long)
    with pytest.raises(UsageError, match=r"\[2, 1, 10, 10\]"):
        Visibility.of(ids, torch.ones(2, 1, 10, 10))
    with pytest.raises(UsageError, match="one row"):
        Visibility.of(ids, cu_seqlens=torch.tensor([0, 10]))


@pytest.mark.parametrize("blocks", ["causal", "windowed", "full"])
@pytest.mark.parametrize("cp", [1, 2])
def test_no_decision_reads_the_device(blocks: Literal["causal", "windowed", "full"], cp: int) -> None:
    """On the meta device, where nothing can be read: what a mask decides comes from the description on the host."""
    types = torch.zeros(1, 64, dtype=torch.int64)
    types[:, 10:17] = 1
    bounds = torch.tensor([0, 24, 64], dtype=torch.int32)
    on_host = Visibility.of(types, None, bounds, types)
    on_device = on_host.to(torch.device("meta"))
    assert on_host.to(torch.device("cpu")) is on_host and on_device.document.is_meta
    if cp > 1:
        on_host, on_device = (v.on(Zigzag(64, cp, 1)) for v in (on_host, on_device))
    rule = MaskRule(16, blocks)
    ours, wanted = mask_of(on_device, rule), mask_of(on_host, rule)
    assert ours.tiles(8) == wanted.tiles(8)
    assert (ours.columns, ours.rows) == (wanted.columns, wanted.rows)
    assert (ours.causal, ours.whole_rows, bool(ours.contiguous)) == (wanted.causal, wanted.whole_rows, True)
    assert ours.reach.first.is_meta and ours.between(slice(0, 4), slice(0, 8)).is_meta
    assert block_mask(ours, 16).kv_num_blocks.is_meta
    bounds_sent, longest = _documents(ours)
    assert bounds_sent.is_meta and longest == 40
    if cp > 1:
        plan, other = exchange_of(on_device, rule), exchange_of(on_host, rule)
        assert (plan.send_counts, plan.receive_counts) == (other.send_counts, other.receive_counts)
    with pytest.raises(RuntimeError, match="meta"):
        mask_of(Visibility(on_device.document, on_device.index, on_device.block), rule).tiles(8)
