"""Exported quantized folders as transformers reads them, with compressed-tensors' own decompression."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, CompressedTensorsConfig

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf

from .conftest import Toy


def logits(folder: Path, **options: object) -> torch.Tensor:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.arange(8, 40)[None], use_cache=False).logits
    return found


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8-dynamic", "w4a16", "nvfp4"])
@pytest.mark.parametrize("variant", ["e2b", "e4b", "12b", "31b"])
def test_logits_are_those_of_the_dequantized_model(variant: str, scheme: str, toy: Toy, tmp_path: Path) -> None:
    """26B-A4B is left out: its experts, quantized one by one, are no linears in transformers."""
    import_hf(toy(variant), tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "quantized", quantize=scheme)
    import_hf(tmp_path / "quantized", tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "plain")
    ours = logits(tmp_path / "plain")
    theirs = logits(tmp_path / "quantized", quantization_config=CompressedTensorsConfig(run_compressed=False))
    assert (ours - theirs).abs().max() <= 1e-4 * ours.abs().max()
    before = logits(toy(variant))
    assert (ours - before).abs().max() > 1e-3 * ours.abs().max()
