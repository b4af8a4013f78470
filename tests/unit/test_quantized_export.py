"""`export --quantize`: every packed byte and scale is the one that compressed-tensors makes of the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.convert.quantize import encode, encode_e4m3
from bridge.convert.quantized_export import PRESETS
from bridge.errors import CheckpointError, UsageError
from bridge.toy import VARIANTS, write_toy
from tests.quantized_kit import LINEARS, dequantized, per_expert, quantize, stacked

SCHEMES = {
    "fp8-dynamic": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
    "w4a16": QuantizationScheme(
        targets=["Linear"],
        weights=preset_name_to_scheme("W4A16", ["Linear"]).weights.model_copy(update={"group_size": 32}),
    ),
    "nvfp4": preset_name_to_scheme("NVFP4A16", ["Linear"]),
}


def expected(plain: Mapping[str, Tensor], scheme: QuantizationScheme) -> dict[str, Tensor]:
    """The stored tensors; q, k and v of a layer, and gate and up, have the largest value of all of them in common."""
    assert scheme.weights is not None
    # A stack is quantized as a whole or not at all.
    whole = {n: t for n, t in plain.items() if "experts" in n and t.shape[-1] % (scheme.weights.group_size or 1)}
    result: dict[str, Tensor] = dict(whole)
    weights = per_expert({name: tensor for name, tensor in plain.items() if name not in whole})
    for name, weight in weights.items():
        if LINEARS.fullmatch(name) is None or weight.shape[1] % (scheme.weights.group_size or 1):
            result[name] = weight
            continue
        module, _, last = name.removesuffix(".weight").rpartition(".")
        fused = next((f for f in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if last in f), (last,))
        top = torch.stack([weights[n].abs().max() for f in fused if (n := f"{module}.{f}.weight") in weights]).max()
        state = quantize(weight, scheme, top=top.reshape(1))
        state.pop("input_global_scale", None)
        result |= {f"{module}.{last}.{key}": value for key, value in state.items()}
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """A toy without weights that nobody uses, and its Megatron checkpoint."""
    base = tmp_path_factory.mktemp("toys")

    def get(variant: str, dtype: str = "bfloat16") -> tuple[Path, Path]:
        name = f"{variant}-{dtype}"
        if not (base / name).exists():
            write_toy(variant, base / name, dtype=dtype, dead_kv=False)
            import_hf(base / name, base / f"{name}-megatron")
        return base / name, base / f"{name}-megatron"

    return get


def check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, theirs), name


CASES = [
    *((variant, preset, "bfloat16") for variant in VARIANTS for preset in SCHEMES),
    *(("12b", preset, "float32") for preset in SCHEMES),
]
IN_MAKE_TEST = {("e2b", "w4a16"), ("12b", "fp8-dynamic"), ("12b", "nvfp4"), ("26b-a4b", "nvfp4"), ("12b", "w4a16")}


@pytest.mark.parametrize(
    ("variant", "preset", "dtype"),
    [pytest.param(*case, marks=[] if case[:2] in IN_MAKE_TEST else pytest.mark.slow) for case in CASES],
)
def test_every_byte(
    variant: str, preset: str, dtype: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    plain, megatron = made(variant, dtype)
    said: list[str] = []
    export_hf(megatron, tmp_path / "q", quantize=preset, notify=said.append)
    wanted = expected(load_file(plain / "model.safetensors"), SCHEMES[preset])
    found = load_file(tmp_path / "q" / "model.safetensors")
    check_same(found, wanted)
    assert any(PRESETS[preset].name in line for line in said)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    read = QuantizationConfig.model_validate(config["quantization_config"])
    (group,) = read.config_groups.values()
    assert isinstance(group, QuantizationScheme)
    assert group.model_dump(exclude={"format"}) == SCHEMES[preset].model_dump(exclude={"format"})
    assert {**config, "quantization_config": None} == {
        **json.loads((plain / "config.json").read_text()),
        "quantization_config": None,
    }
    matrices = {n.removesuffix(".weight") for n, t in found.items() if n.endswith(".weight") and t.ndim == 2}
    matrices -= {n.removesuffix(".weight_scale") for n in found if n.endswith(".weight_scale")}
    assert matrices <= set(read.ignore or [])

    # And in again: what compressed-tensors makes of it.
    import_hf(tmp_path / "q", tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        module, _, last = name.rpartition(".")
        if f"{module}.weight_scale" in found:
            modules.setdefault(module, {})[last] = tensor
    values = {n: t for n, t in found.items() if n.rpartition(".")[0] not in modules}
    target = getattr(torch, dtype)
    values |= {f"{m}.weight": dequantized(state, SCHEMES[preset], target) for m, state in modules.items()}
    check_same(back, stacked(values) if any(".experts.0." in n for n in values) else values)


@pytest.mark.parametrize("preset", SCHEMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_at_the_edges(preset: str, dtype: str, made: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    """Blocks of zeros, zeros with a sign, ties, the smallest and the largest numbers."""
    plain, _ = made("12b", dtype)
    tensors = load_file(plain / "model.safetensors")
    numbers = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if LINEARS.fullmatch(name)]:
        weight = tensors[name].float()
        weight[0] = 0
        weight[1] = -0.0
        weight[2, :32] = 0
        weight[3] = torch.arange(weight.shape[1]) / 4 - 6
        weight[4] = torch.randn(weight.shape[1], generator=numbers) * 1e-38
        weight[5] = torch.randn(weight.shape[1], generator=numbers) * 1e-42
        weight[6, ::2] *= 1e-6
        weight[7] = torch.randn(weight.shape[1], generator=numbers) * 1e30
        tensors[name] = weight.to(tensors[name].dtype)
    folder = tmp_path / "in"
    folder.mkdir()
    for path in plain.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    import_hf(folder, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "q", quantize=preset)
    check_same(load_file(tmp_path / "q" / "model.safetensors"), expected(tensors, SCHEMES[preset]))


def test_e4m3_is_that_of_torch() -> None:
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint32) << np.uint32(16)
    values = every.view(np.float32)
    values = values[np.isfinite(values)]
    theirs = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(encode_e4m3(values), theirs)


def test_ties_of_e2m1_are_those_of_compressed_tensors() -> None:
    """Every multiple of an eighth, which all the ties are among: the scales are one."""
    values = torch.arange(-64, 64).float().reshape(8, 16) / 8
    theirs = quantize_and_pack_fp4(values, torch.ones(8, 1))
    ones = np.ones((8, 1), dtype=np.float32)
    assert np.array_equal(encode(values.numpy(), ones, "e2m1", "F32"), theirs.numpy())


def test_weights_that_no_model_uses_are_dropped(tmp_path: Path) -> None:
    write_toy("e2b", tmp_path / "in")
    import_hf(tmp_path / "in", tmp_path / "megatron")
    said: list[str] = []
    export_hf(tmp_path / "megatron", tmp_path / "q", quantize="fp8-dynamic", notify=said.append)
    write_toy("e2b", tmp_path / "lean", dead_kv=False)
    import_hf(tmp_path / "lean", tmp_path / "lean-megatron")
    export_hf(tmp_path / "lean-megatron", tmp_path / "lean-q", quantize="fp8-dynamic")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "lean-q"))
    check_same(ours, theirs)
    assert any("no model uses" in line for line in said)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(value: float, made: Callable[..., Any], tmp_path: Path) -> None:
    plain, _ = made("12b")
    tensors = load_file(plain / "model.safetensors")
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    write_toy("12b", tmp_path / "in")
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    import_hf(tmp_path / "in", tmp_path / "megatron")
    with pytest.raises(CheckpointError, match=name):
        export_hf(tmp_path / "megatron", tmp_path / "q", quantize="fp8-dynamic")
    assert not (tmp_path / "q").exists()
    with pytest.raises(UsageError, match="w4a16"):
        export_hf(tmp_path / "megatron", tmp_path / "q", quantize="int3")
