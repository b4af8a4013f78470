"""A folder of quantized weights is the plain one that it stands for, wherever a model folder is taken."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.convert.plain import write_plain
from bridge.geometry import Geometry
from bridge.lora.merge import merge_adapter, open_base
from bridge.lora.peft_folder import open_peft
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.verify.reference import load_hf
from bridge.verify.run import verify
from bridge.verify.sample import random_sample
from tests.functional.adapter_kit import make_adapter
from tests.functional.conftest import Toy
from tests.functional.test_lora_runs import lora_recipe
from tests.functional.training_kit import train_toy
from tests.quantized_kit import SCHEMES, write


def test_verify_in_a_layout(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """Every rank dequantizes its own rows and columns; transformers computes with the whole plain folder."""
    scheme = SCHEMES["int4-g8-asymmetric"]
    folder = write(toy("26b-a4b"), tmp_path / "q", scheme, torch.float32).folder
    layout = Parallel(tp=2, ep=2, sequence_parallel=True)
    checks = verify(folder, checks=["round-trip", "logits"], parallel=layout, pool=ranks, workdir=tmp_path)
    assert {check.name for check in checks} == {"round-trip", "logits"}
    assert all(check.passed for check in checks), checks


def test_adapters_on_quantized_weights(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """A run on a quantized folder is, to the bit, that on the plain one, and its export is a plain folder."""
    quantized = write(toy("12b"), tmp_path / "q", SCHEMES["fp8-channel"], torch.float32).folder
    write_plain(quantized, tmp_path / "plain")
    for base in (quantized, tmp_path / "plain"):
        said = lora_recipe(base, tmp_path / f"run-{base.name}", 2) | {
            "export": {"hf": str(tmp_path / f"out-{base.name}")}
        }
        ranks.run(train_toy, said, [], world_size=1)
    ours, theirs = (load_file(tmp_path / f"out-{name}" / "model.safetensors") for name in ("q", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "out-q" / "config.json").read_text())
    assert config == json.loads((tmp_path / "out-plain" / "config.json").read_text())
    assert "quantization_config" not in config


def test_transformers_computes_with_what_is_written(toy: Toy, tmp_path: Path) -> None:
    """compressed-tensors, in transformers, makes the weights of it that are read here."""
    import_hf(toy("12b"), tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "q", quantize="w4a16")
    write_plain(tmp_path / "q", tmp_path / "plain")
    geometry = Geometry.from_folder(toy("12b"))
    sample = random_sample(geometry, seed=0)
    logits = []
    for name in ("q", "plain"):
        model = load_hf(tmp_path / name, geometry, torch.float32)
        with torch.no_grad():
            logits.append(model(**sample.inputs(), use_cache=False).logits)
    real = sample.inputs()["attention_mask"].bool()
    assert (logits[0][real] - logits[1][real]).abs().max() <= 1e-4


def test_an_adapter_is_merged_before(toy: Toy, tmp_path: Path) -> None:
    """The folder of a merge that quantizes is the export, quantized, of the merged model."""
    make_adapter(toy("12b"), tmp_path / "peft", target_modules="all-linear")
    with ExitStack() as stack:
        base = open_base(stack, toy("12b"))
        adapter = open_peft(stack, tmp_path / "peft", base.table)
        merge_adapter(base, adapter, tmp_path / "merged")
        merge_adapter(base, adapter, tmp_path / "q", quantize="w4a16")
    import_hf(tmp_path / "merged", tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "again", quantize="w4a16")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "q" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    assert (tmp_path / "q" / "model.safetensors").stat().st_size < (toy("12b") / "model.safetensors").stat().st_size
