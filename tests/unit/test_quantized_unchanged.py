"""`export --unchanged-from` and merges into a quantized base: linears that training did not touch keep their bytes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.lora.merge import merge_adapter, open_base
from bridge.lora.peft_folder import open_peft
from bridge.toy import write_toy
from bridge.verify.reference import load_hf
from tests.quantized_kit import write
from tests.unit.test_quantized_export import SCHEMES, check_same

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale")


def linears(folder: Path) -> dict[str, Tensor]:
    """What is stored of quantized linears, but for scales of activations."""
    stored = load_file(folder / "model.safetensors")
    modules = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    return {
        f"{module}.{last}": stored[f"{module}.{last}"]
        for module in modules
        for last in ("weight", *SUFFIXES)
        if f"{module}.{last}" in stored
    }


def folder_of_another_tool(variant: str, preset: str, base: Path) -> Path:
    """Scales that no export here would choose: of weights a tenth larger than those that are rounded."""
    write_toy(variant, base / "plain", dead_kv=False)
    write(base / "plain", base / "quantized", SCHEMES[preset], scale_dtype=_scale_dtype(preset), moe="moe.")
    path = base / "quantized" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(".weight_scale") and preset != "nvfp4":
            tensors[name] = (tensors[name].float() * 1.1).to(tensors[name].dtype)
        if name.endswith(".weight_global_scale"):
            tensors[name] = tensors[name] * 0.9
    save_file(tensors, path, metadata={"format": "pt"})
    return base / "quantized"


def _scale_dtype(preset: str) -> torch.dtype | None:
    return torch.float32 if preset == "fp8-dynamic" else None


def named(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".moe.experts", ".experts"): tensor for name, tensor in stored.items()}


@pytest.mark.parametrize(("variant", "preset"), [("26b-a4b", "fp8-dynamic"), ("12b", "w4a16"), ("12b", "nvfp4")])
def test_every_byte_of_what_was_not_touched(variant: str, preset: str, tmp_path: Path) -> None:
    source = folder_of_another_tool(variant, preset, tmp_path)
    import_hf(source, tmp_path / "megatron")
    said: list[str] = []
    export_hf(tmp_path / "megatron", tmp_path / "kept", quantize=preset, unchanged_from=source, notify=said.append)
    kept = linears(tmp_path / "kept")
    original = named(linears(source))
    check_same({name: kept[name] for name in original}, original)
    modules = len({name.rpartition(".")[0] for name in original})
    assert any(f"{modules} of them keep the codes and scales" in line for line in said), said
    # By rounding the values again they are others: not arithmetic, but what was kept, gives the bytes back.
    export_hf(tmp_path / "megatron", tmp_path / "again", quantize=preset)
    again = linears(tmp_path / "again")
    assert any(not _same(again[name], tensor) for name, tensor in original.items())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("preset", SCHEMES)
def test_a_merge_quantizes_again_what_has_an_adapter(preset: str, tmp_path: Path) -> None:
    """k_proj of one layer: alone, or with those that share its global scale."""
    source = folder_of_another_tool("12b", preset, tmp_path)
    model = load_hf(tmp_path / "plain", Geometry.from_folder(tmp_path / "plain"), torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.layers.1.self_attn.k_proj"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "peft")
    with ExitStack() as stack:
        base = open_base(stack, source)
        merge_adapter(base, open_peft(stack, tmp_path / "peft", base.table), tmp_path / "merged", quantize=preset)
    ours, original = linears(tmp_path / "merged"), linears(source)
    changed = {name.rpartition(".")[0] for name, tensor in original.items() if not _same(ours[name], tensor)}
    layer = "model.language_model.layers.1.self_attn."
    wanted = {"q_proj", "k_proj", "v_proj"} if preset == "nvfp4" else {"k_proj"}
    assert changed == {layer + name for name in wanted}


def test_other_schemes_and_plain_folders(tmp_path: Path) -> None:
    """Groups of 16 are none of w4a16's: everything is rounded again. A plain folder has nothing to keep."""
    write_toy("12b", tmp_path / "plain")
    weights = preset_name_to_scheme("W4A16", ["Linear"]).weights
    assert weights is not None
    other = QuantizationScheme(targets=["Linear"], weights=weights.model_copy(update={"group_size": 16}))
    write(tmp_path / "plain", tmp_path / "quantized", other)
    import_hf(tmp_path / "quantized", tmp_path / "megatron")
    said: list[str] = []
    export_hf(
        tmp_path / "megatron",
        tmp_path / "out",
        quantize="w4a16",
        unchanged_from=tmp_path / "quantized",
        notify=said.append,
    )
    assert any("0 of them keep" in line for line in said)
    export_hf(tmp_path / "megatron", tmp_path / "without", quantize="w4a16")
    check_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("out", "without")))
    with pytest.raises(UsageError, match=r"--unchanged-from .*: its weights are not quantized"):
        export_hf(tmp_path / "megatron", tmp_path / "x", quantize="w4a16", unchanged_from=tmp_path / "plain")
    with pytest.raises(UsageError, match="add --quantize"):
        export_hf(tmp_path / "megatron", tmp_path / "x", unchanged_from=tmp_path / "plain")
