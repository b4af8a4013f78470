"""The tables: complete for the published models, disjoint, invertible, and documented."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bridge.errors import MappingError
from bridge.geometry import Geometry
from bridge.mapping import docs, table_for
from bridge.mapping.transforms import num_rows
from bridge.toy import VARIANTS

ROOT = Path(__file__).parents[2]


def geometry(variant: str) -> Geometry:
    return Geometry.from_dict(json.loads((ROOT / "bridge" / "variants" / f"{variant}.json").read_text()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_are_those_of_the_published_text_model(variant: str) -> None:
    """Against the transformers class on the meta device: every language-model tensor, with its shape."""
    import torch
    import transformers

    config = json.loads((ROOT / "bridge" / "variants" / f"{variant}.json").read_text())
    kind = "Unified" if config["model_type"] == "gemma4_unified" else ""
    text = getattr(transformers, f"Gemma4{kind}TextConfig")(**config["text_config"])
    with torch.device("meta"):
        model = getattr(transformers, f"Gemma4{kind}ForCausalLM")(text)
    expected = {
        name.replace("model.", "model.language_model.", 1): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    table = table_for(geometry(variant))
    ours = {s.name: s.shape for entry in table.entries.values() for s in entry.sources if "language_model" in s.name}
    assert ours == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_of_every_tensor_is_used_once(variant: str) -> None:
    for entry in table_for(geometry(variant)).entries.values():
        covered = np.zeros(num_rows(entry.shape), dtype=int)
        sources = [np.zeros(num_rows(source.shape), dtype=int) for source in entry.sources]
        for block in entry.blocks:
            covered[block.row : block.row + block.num_rows] += 1
            sources[block.source][block.source_row : block.source_row + block.num_rows] += 1
        assert (covered == 1).all(), entry.key
        assert all((rows == 1).all() for rows in sources), entry.key
        assert math.prod(entry.shape) == sum(math.prod(source.shape) for source in entry.sources)


def test_fused_rows_lie_where_megatron_wants_them() -> None:
    """E4B, layer 0: 8 heads, 2 groups of head dim 256."""
    entry = table_for(geometry("e4b")).entries["decoder.layers.0.self_attention.linear_qkv.weight"]
    starts = [(block.row // 256, block.source, block.source_row // 256) for block in entry.blocks]
    assert starts == [(0, 0, 0), (4, 1, 0), (5, 2, 0), (6, 0, 4), (10, 1, 1), (11, 2, 1)]


def test_what_layers_lack_is_in_no_row() -> None:
    table = table_for(geometry("12b"))
    assert [len(table.entries[f"decoder.layers.{i}.self_attention.linear_qkv.weight"].sources) for i in (4, 5)] == [
        3,
        2,
    ]
    table = table_for(geometry("e2b"))
    assert len(table.entries["decoder.layers.20.self_attention.linear_qkv.weight"].sources) == 1
    assert "decoder.layers.20.self_attention.k_layernorm.weight" not in table.entries
    assert table.is_carried("model.language_model.layers.20.self_attn.v_proj.weight")


def test_gaps_are_named() -> None:
    table = table_for(geometry("31b"))
    shapes = {s.name: s.shape for entry in table.entries.values() for s in entry.sources}
    table.check_folder(shapes, "here")
    name = "model.language_model.layers.59.mlp.down_proj.weight"
    for broken in (
        {k: v for k, v in shapes.items() if k != name},
        shapes | {name + "_scale": (1,)},
        shapes | {name: (1, 2)},
    ):
        with pytest.raises(MappingError, match=r"layers\.59\.mlp\.down_proj\.weight"):
            table.check_folder(broken, "here")
    keys = {key: entry.shape for key, entry in table.entries.items()}
    key = "decoder.layers.3.mlp.linear_fc2.weight"
    for broken in ({k: v for k, v in keys.items() if k != key}, keys | {key + "2": (1,)}, keys | {key: (3,)}):
        with pytest.raises(MappingError, match=r"layers\.3\.mlp\.linear_fc2\.weight"):
            table.check_keys(broken, "here")


def test_the_page_is_current() -> None:
    assert (ROOT / "docs" / "mapping.md").read_text() == docs.render(), "run `make docs`"
