"""The tables against what transformers writes: every tensor of the full multimodal checkpoints, by name and shape."""

from __future__ import annotations

import pytest

from bridge.geometry import Geometry
from bridge.mapping import table_for
from bridge.toy import VARIANTS
from bridge.toy.config import toy_config
from bridge.toy.write import build

# From the published folders, tied: how many tensors each has.
PUBLISHED = {"e2b": 1951, "e4b": 2076, "12b": 677, "26b-a4b": 1013, "31b": 1188}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_of_the_published_checkpoint_has_a_row(variant: str) -> None:
    toy = toy_config(variant, full_size=True)
    _, shapes = build(toy, "bfloat16", dead_kv=False)
    table = table_for(Geometry.from_dict(toy.written))
    table.check_folder(shapes, variant)
    assert len(table.by_hf_name) == len(shapes) == PUBLISHED[variant]


def test_buffers_are_not_trainable() -> None:
    for variant in VARIANTS:
        for key, entry in table_for(Geometry.from_dict(toy_config(variant).written)).entries.items():
            buffer = key.endswith(("_min", "_max", "std_bias", "std_scale", "layer_scalar"))
            assert entry.row.trainable == (not buffer), key
