"""A folder of quantized weights is the plain one that it stands for, wherever a model folder is taken."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from bridge.convert.plain import write_plain
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.verify.run import verify
from tests.functional.conftest import Toy
from tests.functional.test_lora_training import lora_recipe
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
