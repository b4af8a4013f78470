"""Quantized folders: every element as compressed-tensors' decompression has it, and what is wrong refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.convert.plain import write_plain
from bridge.convert.quantized_folder import DequantizedFolder, open_hf_folder
from bridge.convert.torch_dtypes import TORCH_DTYPES
from bridge.errors import BridgeError
from bridge.hf.folder import HfFolder
from bridge.inspection import inspect_folder
from bridge.toy import VARIANTS, write_toy
from bridge.verify.round_trip import check_round_trip
from tests.quantized_kit import SCHEMES, Quantized, write, write_fp8_blocks, write_modelopt

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    base = tmp_path_factory.mktemp("toys")

    def get(variant: str) -> Path:
        if not (base / variant).exists():
            write_toy(variant, base / variant)
        return base / variant

    return get


def whole(folder: HfFolder, name: str) -> torch.Tensor:
    info = folder.tensors[name]
    out = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    folder.read_rows(name, 0, info.shape[0] if info.shape else 1, out.reshape(-1).view(torch.uint8).numpy())
    return out


def check_equal(quantized: Quantized, dtype: str | None) -> None:
    with open_hf_folder(quantized.folder, dtype) as folder:
        assert isinstance(folder, DequantizedFolder)
        assert set(folder.tensors) == set(quantized.expected)
        for name, expected in quantized.expected.items():
            found = whole(folder, name)
            assert found.dtype == expected.dtype and found.shape == expected.shape, name
            assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name


EXPERTS = ("fp8-block", "int4-g8-asymmetric")


@pytest.mark.parametrize(
    ("variant", "scheme"),
    [
        pytest.param(
            variant,
            scheme,
            marks=[] if variant == "12b" or (variant == "26b-a4b" and scheme in EXPERTS) else pytest.mark.slow,
        )
        for variant in VARIANTS
        for scheme in SCHEMES
    ],
)
def test_every_element_is_that_of_the_decompression(
    variant: str, scheme: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    check_equal(write(made(variant), tmp_path / "q", SCHEMES[scheme]), None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_import_of_every_variant(variant: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """Through the Megatron checkpoint and back: the plain folder, with scales that are float32 on the way."""
    dtype = "bfloat16" if variant in ("e2b", "12b") else "float32"
    scheme = {"e2b": "int4-g8", "e4b": "fp8-channel", "12b": "int4-g8-asymmetric", "26b-a4b": "nvfp4"}.get(variant)
    scales = torch.float32 if scheme is None else None
    quantized = write(made(variant), tmp_path / "q", SCHEMES[scheme or "fp8-block"], DTYPES[dtype], scales)
    said: list[str] = []
    import_hf(quantized.folder, tmp_path / "megatron", dtype=dtype, notify=said.append)
    assert any("quantized weights" in line for line in said)
    export_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(back) == set(quantized.expected)
    for name, expected in quantized.expected.items():
        assert torch.equal(back[name], expected.to(DTYPES[dtype])), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == dtype


@pytest.mark.parametrize("scale", [torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_of_any_dtype(scale: torch.dtype, dtype: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """The product is rounded to the dtype of the scale, and that to the wanted one."""
    quantized = write(made("12b"), tmp_path / "q", SCHEMES["int4-g8-asymmetric"], DTYPES[dtype], scale)
    check_equal(quantized, {"bfloat16": "BF16", "float32": "F32"}[dtype])


@pytest.mark.parametrize(("variant", "in_config"), [("31b", False), ("26b-a4b", True)])
def test_modelopt(variant: str, in_config: bool, made: Callable[[str], Path], tmp_path: Path) -> None:
    quantized = write_modelopt(made(variant), tmp_path / "q", in_config=in_config)
    check_equal(quantized, None)
    import_hf(quantized.folder, tmp_path / "megatron")
    assert not (tmp_path / "megatron" / "hf" / "hf_quant_config.json").exists()


@pytest.mark.parametrize(("variant", "dtype"), [("e2b", "float32"), ("26b-a4b", "bfloat16")])
def test_fp8_with_block_scales(variant: str, dtype: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    quantized = write_fp8_blocks(made(variant), tmp_path / "q", DTYPES[dtype])
    check_equal(quantized, {"bfloat16": "BF16", "float32": "F32"}[dtype])


def test_experts_below_moe(made: Callable[[str], Path], tmp_path: Path) -> None:
    check_equal(write(made("26b-a4b"), tmp_path / "q", SCHEMES["int4-g8"], moe="moe."), None)


@pytest.mark.parametrize(
    ("variant", "scheme"),
    [("26b-a4b", "fp8-block"), ("12b", "int4-g8-asymmetric"), ("12b", "nvfp4"), ("12b", "int8-packed-asymmetric")],
)
def test_rows_and_columns_are_those_of_the_whole(
    variant: str, scheme: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """What a rank reads: any rows, and any columns of axis 1 of them."""
    quantized = write(made(variant), tmp_path / "q", SCHEMES[scheme])
    numbers = np.random.default_rng(0)
    with open_hf_folder(quantized.folder) as folder:
        names = [name for name, info in folder.tensors.items() if len(info.shape) > 1 and ".layers.0." in name]
        for name in names:
            tensor = quantized.expected[name]
            for _ in range(6):
                low, high = sorted(numbers.integers(0, len(tensor) + 1, 2))
                first, last = sorted(numbers.choice(tensor.shape[1] + 1, 2, replace=False))
                out = torch.empty((high - low, *tensor.shape[1:]), dtype=tensor.dtype)
                folder.read_rows(name, low, high, out.reshape(-1).view(torch.uint8).numpy())
                assert torch.equal(out, tensor[low:high]), name
                inner = tensor[0, 0].numel()
                out = torch.empty((high - low, last - first, *tensor.shape[2:]), dtype=tensor.dtype)
                view = out.reshape(-1).view(torch.uint8).numpy()
                folder.read_columns(name, low, high, first * inner, last * inner, view)
                assert torch.equal(out, tensor[low:high, first:last]), name


def test_inspect_and_round_trip(made: Callable[[str], Path], tmp_path: Path) -> None:
    quantized = write(made("e2b"), tmp_path / "q", SCHEMES["nvfp4"])
    result = inspect_folder(quantized.folder)
    assert len(result.storage) == 1 and "NVFP4" in result.storage[0] and "NVFP4" in result.format
    assert result.to_json()["quantized"] == list(result.storage)
    assert result.parameters == inspect_folder(made("e2b")).parameters
    assert all(row.passed for row in check_round_trip(quantized.folder, None, "x"))
    write_plain(quantized.folder, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert all(torch.equal(plain[name], expected) for name, expected in quantized.expected.items())


def test_groups_with_schemes_of_their_own(made: Callable[[str], Path], tmp_path: Path) -> None:
    """A module takes the scheme of the group that names it, or matches it, before that of its class."""
    first = write(made("12b"), tmp_path / "a", SCHEMES["int4-g8"])
    second = write(made("12b"), tmp_path / "b", SCHEMES["fp8-channel"])
    one, two = (load_file(q.folder / "model.safetensors") for q in (first, second))
    tensors = {n: t for n, t in one.items() if ".mlp." not in n} | {n: t for n, t in two.items() if ".mlp." in n}
    save_file(tensors, first.folder / "model.safetensors")
    path = first.folder / "config.json"
    config, other = json.loads(path.read_text()), json.loads((second.folder / "config.json").read_text())
    group = other["quantization_config"]["config_groups"]["group_0"]
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = {**group, "targets": ["re:.*mlp.*"], "format": "float-quantized"}
    groups["group_0"]["format"] = "pack-quantized"
    config["quantization_config"]["format"] = "mixed-precision"
    path.write_text(json.dumps(config))
    expected = {n: (second if ".mlp." in n else first).expected[n] for n in first.expected}
    check_equal(Quantized(first.folder, expected), None)


# --- What is wrong is refused by name ---

LAYER = "model.language_model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def quantized_once(made: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder of a scheme, which the tests that change it copy."""
    base = tmp_path_factory.mktemp("quantized")

    def get(scheme: str, variant: str = "12b") -> Path:
        folder = base / f"{variant}-{scheme}"
        return folder if folder.exists() else write(made(variant), folder, SCHEMES[scheme]).folder

    return get


@pytest.fixture
def broken(quantized_once: Callable[..., Path], tmp_path: Path) -> Callable[..., str]:
    """The error of importing a folder whose tensors were changed."""

    def get(scheme: str, change: Callable[[dict[str, torch.Tensor]], object], variant: str = "12b") -> str:
        folder = Path(shutil.copytree(quantized_once(scheme, variant), tmp_path / "q"))
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(BridgeError) as error:
            import_hf(folder, tmp_path / "megatron")
        assert not (tmp_path / "megatron").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    return get


@pytest.mark.parametrize(
    ("scheme", "suffix"),
    [
        ("int4-g8", "weight_scale"),
        ("int4-g8", "weight_shape"),
        ("int4-g8", "weight_packed"),
        ("int4-g8-asymmetric", "weight_zero_point"),
        ("nvfp4", "weight_global_scale"),
        ("nvfp4", "weight_scale"),
    ],
)
def test_a_missing_tensor(scheme: str, suffix: str, broken: Callable[..., str]) -> None:
    assert f"{LAYER}.{suffix}" in broken(scheme, lambda tensors: tensors.pop(f"{LAYER}.{suffix}"))


def test_codes_without_any_scale(broken: Callable[..., str]) -> None:
    assert f"{LAYER}.weight is F8_E4M3" in broken("fp8-channel", lambda t: t.pop(f"{LAYER}.weight_scale"))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{LAYER}.weight_g_idx", torch.zeros(64, dtype=torch.int32)),
        (f"{LAYER}.weight_scale_2", torch.ones(1)),
        (f"{LAYER}.weight", torch.ones(96, 64, dtype=torch.bfloat16)),
        ("model.language_model.layers.1.extra.weight", torch.ones(3, 3, dtype=torch.bfloat16)),
        ("model.language_model.layers.1.mlp.weight_scale", torch.ones(3)),
        ("model.language_model.embed_tokens.weight_scale", torch.ones(512, 1)),
    ],
)
def test_a_tensor_too_many(name: str, tensor: torch.Tensor, broken: Callable[..., str]) -> None:
    assert name.rpartition(".")[0] in broken("int4-g8", lambda tensors: tensors.update({name: tensor}))


@pytest.mark.parametrize(
    ("scheme", "suffix", "change"),
    [
        ("int4-g8", "weight_scale", lambda t: t[:, :-1].contiguous()),
        ("int4-g8", "weight_scale", lambda t: t.view(torch.int16)),
        ("int4-g8", "weight_packed", lambda t: t[:-1].contiguous()),
        ("int4-g8", "weight_packed", lambda t: t.to(torch.int64)),
        ("int4-g8", "weight_shape", lambda t: t + 1),
        ("int4-g8", "weight_shape", lambda t: t * 2**40),
        ("int4-g8-asymmetric", "weight_zero_point", lambda t: t[:-1].contiguous()),
        ("fp8-channel", "weight_scale", lambda t: t.reshape(-1)),
        ("fp8-channel", "weight", lambda t: t.view(torch.int8)),
        ("fp8-tensor", "weight_scale", lambda t: t.repeat(2)),
        ("fp8-block", "weight_scale", lambda t: t[:-1].contiguous()),
        ("nvfp4", "weight_global_scale", lambda t: t.repeat(2)),
        ("nvfp4", "weight_global_scale", lambda t: t * 0),
        ("nvfp4", "weight_global_scale", lambda t: t * torch.nan),
    ],
)
def test_what_does_not_fit(
    scheme: str, suffix: str, change: Callable[[torch.Tensor], torch.Tensor], broken: Callable[..., str]
) -> None:
    name = f"{LAYER}.{suffix}"
    assert LAYER in broken(scheme, lambda tensors: tensors.update({name: change(tensors[name])}))


def test_experts_that_are_missing(broken: Callable[..., str]) -> None:
    expert = "model.language_model.layers.0.experts.3.up_proj.weight"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(expert)]:
            del tensors[name]

    assert expert in broken("int4-g8", drop, "26b-a4b")


def int4_config(**weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True} | weights
    group = {"targets": ["Linear"], "weights": args}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "FP8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "W4A8_AWQ"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "ue8m0"),
        (int4_config(num_bits=3), "3-bit"),
        (int4_config(actorder="group"), "actorder"),
        (int4_config(surprise=1), "surprise"),
        (int4_config(type="float"), "groups of 8"),
        (int4_config(strategy="token"), "token"),
        (int4_config(strategy="channel", symmetric=False) | {"format": "mxfp4-pack-quantized"}, "mxfp4"),
        (int4_config() | {"format": "marlin-24"}, "marlin-24"),
        (int4_config() | {"format": "dense"}, "dense of 4-bit int"),
        (int4_config() | {"transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
        (int4_config() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (int4_config() | {"config_groups": {"W4A16": ["Linear"]}}, "W4A16"),
        (int4_config() | {"ignore": ["re:(a+)+b"]}, "repeats a group"),
        (int4_config() | {"ignore": ["re:["]}, "no expression"),
        (int4_config() | {"ignore": ["re:.*1.mlp.up_proj"]}, LAYER),
    ],
)
def test_ways_of_quantizing_that_are_not_read(
    config: dict[str, Any], said: str, quantized_once: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(quantized_once("int4-g8"), tmp_path / "q"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(BridgeError) as error:
        import_hf(folder, tmp_path / "megatron")
    assert said in str(error.value)


def test_gguf_is_refused_by_name(tmp_path: Path, made: Callable[[str], Path]) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "gemma-q4_0.gguf").write_bytes(b"GGUF")
    for with_config in (False, True):
        if with_config:
            shutil.copy(made("12b") / "config.json", tmp_path / "g")
        with pytest.raises(BridgeError, match=r"gemma-q4_0\.gguf.*GGUF.*take the safetensors"):
            inspect_folder(tmp_path / "g")
