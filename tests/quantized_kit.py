"""Folders of quantized weights, made of plain ones by the code of compressed-tensors, and what that makes of them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, maybe_pad_tensor_for_block_quant
from safetensors.torch import load_file, save_file
from torch import Tensor

# Of the decoder what the tools quantize; towers, router, embeddings and norms stay.
LINEARS = re.compile(r"(?!.*tower).*layers\.\d+\.(self_attn|mlp|.*experts\.\d+)\.\w+_proj\.weight")
IGNORE = ["re:.*vision.*", "re:.*audio.*", "lm_head", "re:.*router.*", "re:.*embed_tokens.*", "re:.*per_layer.*"]


def _args(**values: Any) -> QuantizationArgs:
    return QuantizationArgs(**values)


def _int4(group: int, symmetric: bool = True, bits: int = 4) -> QuantizationScheme:
    args = _args(num_bits=bits, type="int", strategy="group", group_size=group, symmetric=symmetric)
    return QuantizationScheme(targets=["Linear"], weights=args)


def _of(weights: QuantizationArgs, dynamic: bool = True) -> QuantizationScheme:
    inputs = _args(num_bits=weights.num_bits, type=weights.type, strategy="token", dynamic=True)
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs if dynamic else None)


SCHEMES: dict[str, QuantizationScheme] = {
    "fp8-tensor": _of(_args(num_bits=8, type="float", strategy="tensor")),
    "fp8-channel": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
    "fp8-group": _of(_args(num_bits=8, type="float", strategy="group", group_size=8)),
    # 24 rows of an expert and 96 of an FFN are no multiples of 40.
    "fp8-block": _of(_args(num_bits=8, type="float", strategy="block", block_structure=[40, 8]), dynamic=False),
    "int8-channel": preset_name_to_scheme("W8A8", ["Linear"]),
    "int8-asymmetric": _of(_args(num_bits=8, type="int", strategy="channel", symmetric=False)),
    "int4-g8": _int4(8),
    "int4-g8-asymmetric": _int4(8, symmetric=False),
    "int4-channel-asymmetric": QuantizationScheme(
        targets=["Linear"], weights=_args(num_bits=4, type="int", strategy="channel", symmetric=False)
    ),
    "int8-packed-g8": _int4(8, bits=8),
    "int8-packed-asymmetric": _int4(24, symmetric=False, bits=8),
    "int4-tensor": QuantizationScheme(targets=["Linear"], weights=_args(num_bits=4, type="int", strategy="tensor")),
    "nvfp4": preset_name_to_scheme("NVFP4", ["Linear"]),
}


@dataclass(frozen=True)
class Quantized:
    """A quantized folder, and the plain tensors that compressed-tensors makes of it (`expected`)."""

    folder: Path
    expected: Mapping[str, Tensor]


def quantize(
    weight: Tensor,
    scheme: QuantizationScheme,
    scale_dtype: torch.dtype | None = None,
    top: Tensor | None = None,
) -> dict[str, Tensor]:
    """One weight by the compressor of its format; scales of its smallest and largest values, as without data.

    `top` [1]: the largest absolute value of all that share its global scale.
    """
    args = scheme.weights
    assert args is not None
    flat = _blocks(weight, args)
    low, high = flat.amin(-1), flat.amax(-1)
    top = torch.maximum(low.min().abs(), high.max().abs()).reshape(1) if top is None else top
    global_scale = generate_gparam(-top, top) if args.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=global_scale)
    scale = scale.to(scale_dtype or weight.dtype)
    state = {"weight": weight, "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
        state["input_global_scale"] = torch.tensor([3.0])
    if not args.symmetric:
        state["weight_zero_point"] = zero
    return dict(_compressor(scheme).compress(state, scheme))


def _blocks(weight: Tensor, args: QuantizationArgs) -> Tensor:
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "channel":
        return weight.unsqueeze(1)
    if args.strategy == "block":
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
        rows, columns = padded.shape
        return padded.reshape(rows // height, height, columns // width, width).transpose(1, 2).flatten(2)
    return weight.unflatten(-1, (-1, args.group_size))


def _compressor(scheme: QuantizationScheme) -> Any:
    return BaseCompressor.get_value_from_registry(infer_module_format(torch.nn.Linear, scheme).value)


def dequantized(state: Mapping[str, Tensor], scheme: QuantizationScheme, dtype: torch.dtype) -> Tensor:
    """What compressed-tensors makes of one weight, in `dtype`."""
    return _compressor(scheme).decompress(dict(state), scheme)["weight"].to(dtype)


def per_expert(tensors: Mapping[str, Tensor], moe: str = "") -> dict[str, Tensor]:
    """Stacked experts one by one, as the tools that quantize them store them."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition("experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            result[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = {"down_proj": expert}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            for part, weight in parts.items():
                result[f"{prefix}{moe}experts.{number}.{part}.weight"] = weight.contiguous()
    return result


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `per_expert`."""
    result: dict[str, Tensor] = {}
    found: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*?)(?:moe\.)?experts\.(\d+)\.(\w+)\.weight", name)
        if match is None:
            result[name] = tensor
        else:
            found.setdefault(match[1] + "experts.", {})[int(match[2]), match[3]] = tensor
    for prefix, parts in found.items():
        numbers = sorted({number for number, _ in parts})
        for kinds, stack in ((("gate_proj", "up_proj"), "gate_up_proj"), (("down_proj",), "down_proj")):
            if (0, kinds[0]) in parts:
                whole = [torch.cat([parts[n, kind] for kind in kinds]) for n in numbers]
                result[prefix + stack] = torch.stack(whole)
    return result


def write(
    plain: Path,
    target: Path,
    scheme: QuantizationScheme,
    dtype: torch.dtype = torch.bfloat16,
    scale_dtype: torch.dtype | None = None,
    moe: str = "",
) -> Quantized:
    """`plain` quantized as llm-compressor stores it."""
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in per_expert(load_file(plain / "model.safetensors"), moe).items():
        module = name.removesuffix(".weight")
        if LINEARS.fullmatch(name) is None or not _fits(tensor, scheme):
            stored[name] = expected[name] = tensor
            continue
        state = quantize(tensor, scheme, scale_dtype)
        stored |= {f"{module}.{key}": value.contiguous() for key, value in state.items()}
        expected[name] = dequantized(state, scheme, dtype)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        ignore=IGNORE,
        quantization_status=QuantizationStatus.COMPRESSED,
        format=infer_module_format(torch.nn.Linear, scheme).value,
    )
    write_folder(plain, target, stored, quantization_config=json.loads(config.model_dump_json()))
    return Quantized(target, stacked(expected))


def _fits(tensor: Tensor, scheme: QuantizationScheme) -> bool:
    assert scheme.weights is not None
    return tensor.shape[1] % (scheme.weights.group_size or 1) == 0


def write_folder(plain: Path, target: Path, tensors: Mapping[str, Tensor], **config: Any) -> None:
    """`plain` with other tensors and more keys in its config."""
    shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def write_modelopt(
    plain: Path, target: Path, dtype: torch.dtype = torch.bfloat16, in_config: bool = False
) -> Quantized:
    """NVFP4 as ModelOpt stores it; expected is what compressed-tensors' converter and decompression make of it."""
    scheme = SCHEMES["nvfp4"]
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, tensor in per_expert(load_file(plain / "model.safetensors")).items():
        module = name.removesuffix(".weight")
        if LINEARS.fullmatch(name) is None or not _fits(tensor, scheme):
            stored[name] = expected[name] = tensor
            continue
        state = quantize(tensor, scheme)
        mine = {
            f"{module}.weight": state["weight_packed"],
            f"{module}.weight_scale": state["weight_scale"],
            f"{module}.weight_scale_2": (1 / state["weight_global_scale"]).reshape(()),
            f"{module}.input_scale": torch.tensor(0.25),
        }
        stored |= mine
        # With a global scale of one axis, as compressed-tensors stores it: without one torch divides in 16 bits.
        again = {key: value.reshape(1) if value.ndim == 0 else value for key, value in mine.items()}
        converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(again)
        state = {key.removeprefix(module + "."): value for key, value in converted.items()}
        expected[name] = dequantized(state, scheme, dtype)
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": None}
    quantization["exclude_modules"] = ["lm_head", "model.vision_tower*", "*router*", "model.embed*"]
    if in_config:
        config: dict[str, Any] = {"quant_method": "modelopt", **quantization}
        config["ignore"] = config.pop("exclude_modules")
        write_folder(plain, target, stored, quantization_config=config)
    else:
        write_folder(plain, target, stored)
    document = {"producer": {"name": "modelopt", "version": "0.43.0"}, "quantization": quantization}
    (target / "hf_quant_config.json").write_text(json.dumps(document))
    return Quantized(target, stacked(expected))


def write_fp8_blocks(
    plain: Path, target: Path, dtype: torch.dtype = torch.bfloat16, block: tuple[int, int] = (40, 24)
) -> Quantized:
    """FP8 with block scales as DeepSeek's; experts as transformers stacks them, their scales too."""
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    converter = FP8BlockDequantizer(weight_block_size=block, dtype=dtype)
    scheme = _of(_args(num_bits=8, type="float", strategy="block", block_structure=list(block)), dynamic=False)
    for name, tensor in load_file(plain / "model.safetensors").items():
        is_stack = tensor.ndim == 3 and "experts" in name
        if LINEARS.fullmatch(name) is None and not is_stack:
            stored[name] = expected[name] = tensor
            continue
        states = [quantize(matrix, scheme, torch.float32) for matrix in (tensor if is_stack else tensor[None])]
        plain_values = [
            converter.process({"a.weight": s["weight"], "a.weight_scale_inv": s["weight_scale"]})["a.weight"]
            for s in states
        ]
        join = torch.stack if is_stack else lambda items: items[0]
        stored[name] = join([s["weight"].view(torch.uint8) for s in states]).view(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = join([s["weight_scale"] for s in states])
        expected[name] = join(plain_values)
    config = {"quant_method": "fp8", "weight_block_size": list(block), "activation_scheme": "dynamic", "fmt": "e4m3"}
    write_folder(plain, target, stored, quantization_config=config)
    return Quantized(target, expected)
