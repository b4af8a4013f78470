"""Drafters as folders: read, refused by name, and every byte of them back."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.errors import CheckpointError, GeometryError, MappingError, UsageError
from bridge.geometry import Geometry, bound, producers
from bridge.hf.folder import HfFolder
from bridge.inspection import inspect_folder
from bridge.toy import VARIANTS, write_toy
from bridge.toy.config import toy_config
from bridge.verify.round_trip import check_round_trip
from bridge.verify.run import verify

DTYPES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"dtype": "float32"},
    "mixed": {"mixed_dtypes": True},
}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`drafter(variant, **options)`: the folder of a toy's drafter, written once."""
    base = tmp_path_factory.mktemp("drafters")

    def get(variant: str, **options: Any) -> Path:
        folder = base / "-".join([variant, *(f"{name}={value}" for name, value in sorted(options.items()))])
        if not folder.exists():
            write_toy(variant, folder, drafter=True, **options)
        return folder

    return get


def changed(folder: Path, target: Path, text: dict[str, Any] | None = None, **top: Any) -> Path:
    """A copy of a folder with another config."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["text_config"] |= text or {}
    (target / "config.json").write_text(json.dumps(config | top))
    return target


@pytest.mark.parametrize(
    ("variant", "dtype", "ordered"),
    [(variant, dtype, variant in ("e2b", "e4b")) for variant in VARIANTS for dtype in DTYPES]
    + [("e2b", "bfloat16", False), ("12b", "bfloat16", True)],
)
def test_round_trip(drafter: Make, tmp_path: Path, variant: str, dtype: str, ordered: bool) -> None:
    folder = drafter(variant, ordered=ordered, **DTYPES[dtype])
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    for path in folder.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "hf").iterdir())) == len(list(folder.iterdir()))
    assert all(check.passed for check in check_round_trip(folder, tmp_path / "megatron", variant))
    tensors = load_file(folder / "model.safetensors")
    assert ("masked_embedding.token_ordering" in tensors) == ordered
    if ordered:
        ordering = tensors["masked_embedding.token_ordering"]
        assert ordering.dtype is torch.int64
        assert sorted(ordering.tolist()) == list(range(len(ordering)))
    for path in (folder, tmp_path / "megatron"):
        found = inspect_folder(path)
        assert found.geometry.drafter is not None
        assert found.tensors == (len(tensors) if path == folder else found.tensors)
        assert {kind["shares_kv_of"] for kind in found.to_json()["layer_kinds"]} == {"target"}


@pytest.mark.parametrize(("variant", "untied"), [*((variant, False) for variant in VARIANTS), ("e4b", True)])
def test_it_is_what_transformers_writes(drafter: Make, tmp_path: Path, variant: str, untied: bool) -> None:
    folder = drafter(variant, untied=untied)
    model_class = getattr(transformers, Geometry.from_folder(folder).architecture)
    model, info = model_class.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    model.save_pretrained(tmp_path)
    kinds = []
    for path in (folder, tmp_path):
        with HfFolder(path) as opened:
            kinds.append({name: (tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()})
    assert kinds[0] == kinds[1]
    assert ("lm_head.weight" in kinds[0]) == untied
    for file in ("config.json", "generation_config.json"):
        assert (folder / file).read_bytes() == (tmp_path / file).read_bytes()
    assert model.generation_config.num_assistant_tokens == 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_its_layers_read_the_last_producers_of_the_target(drafter: Make, tmp_path: Path, variant: str) -> None:
    write_toy(variant, tmp_path / "target")
    target, own = Geometry.from_folder(tmp_path / "target"), Geometry.from_folder(drafter(variant))
    makers = [layer for layer in target.layers if not layer.shares_kv]
    expected = {kind: max(layer.index for layer in makers if layer.kind == kind) for kind in ("sliding", "global")}
    assert producers(target.layers) == expected
    assert [layer.kv_source for layer in bound(own, target).layers] == [expected[layer.kind] for layer in own.layers]
    assert all(layer.shares_kv for layer in own.layers)
    other = "31b" if variant != "31b" else "e2b"
    with pytest.raises(GeometryError, match="another model"):
        bound(Geometry.from_folder(drafter(other)), target)
    with pytest.raises(GeometryError, match="no drafter"):
        bound(target, target)


@pytest.mark.parametrize(
    ("text", "top", "named"),
    [
        ({"enable_moe_block": True}, {}, "text_config.enable_moe_block"),
        ({"use_double_wide_mlp": True}, {}, "text_config.use_double_wide_mlp"),
        ({"hidden_size_per_layer_input": 8}, {}, "text_config.hidden_size_per_layer_input"),
        ({"vocab_size_per_layer_input": 8}, {}, "text_config.vocab_size_per_layer_input"),
        ({"num_kv_shared_layers": 2}, {}, "text_config.num_kv_shared_layers"),
        ({"vocab_size": 500}, {}, "num_centroids"),
        ({}, {"centroid_intermediate_top_k": 33}, "centroid_intermediate_top_k"),
        ({}, {"backbone_hidden_size": 0}, "backbone_hidden_size"),
        ({}, {"use_ordered_embeddings": 1}, "use_ordered_embeddings"),
        ({}, {"text_config": None}, "text_config"),
    ],
)
def test_a_config_that_is_no_drafters(
    drafter: Make, tmp_path: Path, text: dict[str, Any], top: dict[str, Any], named: str
) -> None:
    with pytest.raises(GeometryError, match=named):
        Geometry.from_folder(changed(drafter("e2b"), tmp_path / "changed", text, **top))


def test_a_softcap_is_said_not_to_count(drafter: Make, tmp_path: Path) -> None:
    text = {"final_logit_softcapping": 30.0, "num_kv_shared_layers": 0}
    geometry = Geometry.from_folder(changed(drafter("e2b"), tmp_path / "changed", text))
    assert geometry.logit_softcap is None and "softcap" in " ".join(geometry.notices)
    assert all(layer.external_kv for layer in geometry.layers)


def test_token_numbers_of_another_dtype_are_refused(drafter: Make, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(drafter("e2b"), tmp_path / "toy"))
    tensors = load_file(folder / "model.safetensors")
    name = "masked_embedding.token_ordering"
    save_file(tensors | {name: tensors[name].float()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is F32, expected I64"):
        import_hf(folder, tmp_path / "megatron")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(MappingError, match=name):
        import_hf(folder, tmp_path / "megatron")


def test_another_dtype_leaves_token_numbers(drafter: Make, tmp_path: Path) -> None:
    import_hf(drafter("e2b"), tmp_path / "megatron", dtype="float32")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (drafter("e2b"), tmp_path / "hf"))
    for name, tensor in before.items():
        assert after[name].dtype is (torch.int64 if tensor.dtype is torch.int64 else torch.float32)
        assert torch.equal(after[name], tensor.to(after[name].dtype))


def test_options_that_go_with_no_drafter(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [{"drafter": True, "text_only": True}, {"ordered": True}]
    for options in wrong:
        with pytest.raises(UsageError):
            write_toy("e2b", tmp_path / "toy", **options)
    with pytest.raises(
        UsageError, match="e4b: not all sizes of its published drafter are known here, only those of e2b"
    ):
        write_toy("e4b", tmp_path / "toy", drafter=True, full_size=True)


@pytest.mark.slow
def test_the_published_size(tmp_path: Path) -> None:
    """50 tensors and about 78 million parameters, as published; every byte back; bound to the published model."""
    write_toy("e2b", tmp_path / "toy", drafter=True, full_size=True)
    tensors = load_file(tmp_path / "toy" / "model.safetensors")
    sizes = [math.prod(tensor.shape) for tensor in tensors.values() if tensor.is_floating_point()]
    assert len(tensors) == 50 and 77_500_000 < sum(sizes) < 78_500_000
    import_hf(tmp_path / "toy", tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (tmp_path / "toy" / "model.safetensors").read_bytes()
    target = Geometry.from_dict(toy_config("e2b", full_size=True).written)
    geometry = bound(Geometry.from_folder(tmp_path / "toy"), target)
    assert {layer.kv_source for layer in geometry.layers} == {13, 14}


def test_a_drafter_alone_has_no_logits(drafter: Make) -> None:
    with pytest.raises(UsageError, match="--check round-trip"):
        verify(drafter("e2b"))


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bridge.cli"]
    for name, more in (("31b", ["--drafter"]), ("31b-assistant", [])):
        subprocess.run([*command, "toy", name, tmp_path / name, *more, "--ordered"], check=True)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("31b", "31b-assistant")]
    assert weights[0] == weights[1]
    shown = subprocess.run([*command, "inspect", tmp_path / "31b"], check=True, capture_output=True, text=True).stdout
    assert "drafter of a model of hidden size 64" in shown and "6 of 32 clusters" in shown
    sizes = [math.prod(tensor.shape) for tensor in load_file(tmp_path / "31b" / "model.safetensors").values()]
    assert sum(sizes) < 3_000_000
