"""What the provider and its TransformerConfig take, and refuse by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.megatron.provider import Gemma4Provider
from bridge.toy import VARIANTS
from bridge.toy.config import toy_config


def provider(variant: str, **overrides: Any) -> Gemma4Provider:
    geometry = Geometry.from_dict(toy_config(variant).written)
    return Gemma4Provider(geometry, Parallel(pp=2), torch.float32, overrides=overrides)


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout"])
def test_dropout_that_no_layer_has_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}=0\.1: no Gemma 4 model has dropout"):
        _ = provider("e2b", **{name: 0.1}).config


def test_the_masks_of_forward_are_refused_where_there_is_nothing_to_choose() -> None:
    assert provider("12b", vision_mask="forward").config.vision_mask == "forward"
    with pytest.raises(UsageError, match="vision_mask=forward"):
        _ = provider("31b", vision_mask="forward").config


@pytest.mark.parametrize("variant", VARIANTS)
def test_megatron_may_copy_the_config(variant: str) -> None:
    config = provider(variant).config
    clone = copy.deepcopy(config)
    assert clone is not config and clone.geometry == config.geometry
    layers = range(1, config.num_layers + 1)
    for own, theirs in ((config.get_config_for_layer(n), clone.get_config_for_layer(n)) for n in layers):
        assert (own.kv_channels, own.num_query_groups) == (theirs.kv_channels, theirs.num_query_groups)
        assert own.ffn_hidden_size == theirs.ffn_hidden_size
