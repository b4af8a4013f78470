"""`model.fake_quant`: weights are what a quantized folder gives back, gradients what they were; what is refused, and
what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme
from torch import Tensor

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.mapping import table_for
from bridge.megatron.fake_quant import Rounding, round_frozen, rounded
from bridge.megatron.fake_quant_schemes import FAKE_QUANT, check_fake_quant, fake_quantized
from bridge.megatron.parallel import Parallel
from bridge.megatron.provider import Gemma4Provider
from bridge.toy.config import VARIANTS, published, toy_config
from recipes.config import load_recipe
from recipes.memory.activations import Load, Sizes, linear_weights
from recipes.memory.estimate import estimate
from recipes.memory.recipe import plan_of
from tests.quantized_kit import dequantized, quantize

INT4 = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
SCHEMES = {
    "int4-g32": QuantizationScheme(targets=["Linear"], weights=INT4),
    "fp8": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
}
NAMES = ("q4_0", "int4-g32", "fp8")


def weights(dtype: torch.dtype) -> Tensor:
    """Rows of all sizes, of zeros, of ties, and such that a value or its sign decides."""
    numbers = torch.Generator().manual_seed(0)
    weight = torch.randn(1500, 96, generator=numbers) * torch.logspace(-6, 3, 1500)[:, None]
    weight[0] = 0
    weight[1] = -0.0
    weight[2, :32] = 0
    weight[3] = torch.arange(96) / 4 - 12
    weight[4, ::2], weight[4, 1::2] = 2.0, -2.0
    weight[5] *= 1e-38
    weight[6] *= 1e30
    return weight.to(dtype)


def of_compressed_tensors(weight: Tensor, name: str) -> Tensor:
    """What a folder that compressed-tensors quantizes gives back: what `export --quantize` writes, and import reads."""
    return dequantized(quantize(weight, SCHEMES[name]), SCHEMES[name], weight.dtype)


def of_ggml(weight: Tensor) -> Tensor:
    """Blocks as ggml's reference reads: float32 one operation after the other, the step stored in float16."""
    blocks = weight.float().numpy().reshape(-1, 32)
    out = np.empty_like(blocks)
    for i, block in enumerate(blocks):
        top = np.float32(0)
        for value in block:
            if abs(value) > abs(top):
                top = value
        with np.errstate(all="ignore"):
            step = np.float32(top / np.float32(-8))
            inverse = np.float32(1) / step if step else np.float32(0)
            codes = [min(15, int(np.float32(value * inverse) + np.float32(8.5))) for value in block]
            out[i] = (np.array(codes, dtype=np.float32) - 8) * np.float32(np.float16(step))
    return torch.from_numpy(out).reshape(weight.shape).to(weight.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", NAMES)
def test_every_bit_is_that_of_the_stored_weight(name: str, dtype: torch.dtype) -> None:
    weight = weights(dtype)
    if name == "q4_0":
        # ggml computes with what float16 can hold of the step.
        weight = weight[(weight.abs().amax(1) < 1e4) & (weight.abs().amax(1) >= 1e-4) | (weight == 0).all(1)]
        wanted = of_ggml(weight)
    else:
        wanted = of_compressed_tensors(weight, name)
    # Zeros have no sign that a product could tell: of codes and of a step's.
    assert torch.equal(rounded(weight, name), wanted)
    assert not torch.equal(rounded(weight, name), weight)
    stack = weight[:1200].reshape(3, 400, 96)
    assert torch.equal(rounded(stack, name), rounded(weight[:1200], name).reshape(3, 400, 96))


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradient_are_those_of_the_plain_definition(name: str) -> None:
    """x W' of W' = W + (Q(W) - W), the second part a constant."""
    numbers = torch.Generator().manual_seed(1)
    x, weight = torch.randn(5, 96, generator=numbers), torch.randn(40, 96, generator=numbers)
    quantized: Callable[[Tensor], Tensor] = of_ggml if name == "q4_0" else lambda w: of_compressed_tensors(w, name)
    results = []
    for seen in (Rounding(name, {"weight": None}), None):
        inputs, parameter = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if seen is None:
            used = parameter + (quantized(parameter.detach()) - parameter).detach()
        else:
            used = seen("weight", parameter)
        output = torch.nn.functional.linear(inputs, used)
        output.square().sum().backward()
        assert inputs.grad is not None and parameter.grad is not None
        results.append((output.detach(), inputs.grad, parameter.grad))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def test_what_is_frozen_is_rounded_once() -> None:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.randn(4, 64), requires_grad=False)
    module.other = torch.nn.Parameter(torch.randn(4, 64))
    module.rounding = Rounding("int4-g32", {"weight": None, "other": None})
    weight, other = module.weight.clone(), module.other.clone()
    round_frozen([module], in_place=False)
    first = module.rounding("weight", module.weight)
    assert first is module.rounding("weight", module.weight)
    assert torch.equal(first, rounded(weight, "int4-g32")) and torch.equal(module.weight, weight)
    round_frozen([module], in_place=True)
    assert module.rounding("weight", module.weight) is module.weight and torch.equal(module.weight, first)
    assert torch.equal(module.other, other) and list(module.rounding.frozen) == ["weight"]
    # Trained, it is rounded as it is by then.
    with torch.no_grad():
        module.other.mul_(3)
    assert torch.equal(module.rounding("other", module.other), rounded(module.other, "int4-g32"))


def test_columns_that_blocks_do_not_divide_stay() -> None:
    weight = torch.randn(4, 48)
    assert Rounding("q4_0", {"weight": None})("weight", weight) is weight
    assert Rounding("none", {"weight": None})("weight", weight) is weight
    assert Rounding("fp8", {"weight": None})("weight", weight) is not weight


def test_which_weights_are_those_that_the_export_quantizes() -> None:
    geometry = Geometry.from_dict(toy_config("26b-a4b").written)
    keys = {key for key, _, _ in fake_quantized(geometry, "fp8")}
    assert keys == {
        key for key in table_for(geometry).entries if ".linear_" in key and key.startswith("decoder.layers.")
    }
    # 24 columns are no block, and nothing of 32 of them is rounded.
    assert {key for key in keys if ".experts.linear_fc2" in key} == keys - {
        key for key, _, _ in fake_quantized(geometry, "int4-g32")
    }
    assert not any("router" in key or "norm" in key for key in keys)


@pytest.mark.parametrize(
    ("parallel", "options", "said"),
    [
        (Parallel(), {"fake_quant": "int3"}, "fake_quant=int3: is one of none, q4_0, int4-g32, fp8"),
        (
            Parallel(tp=2),
            {"fake_quant": "q4_0"},
            r"tp=2 gives each rank 48 of the 96 columns of .*linear_fc2.weight, no",
        ),
        (Parallel(), {"fake_quant": "fp8", "layer_spec": "te"}, "fake_quant=fp8 needs layer_spec=local"),
        (Parallel(), {"fake_quant": "fp8", "fp8_experts": True}, "rounds the experts' weights itself"),
    ],
)
def test_refused_by_name(parallel: Parallel, options: dict[str, Any], said: str) -> None:
    geometry = Geometry.from_dict(toy_config("e2b").written)
    asked = {"layer_spec": "local", "fp8_experts": False, **options}
    with pytest.raises(UsageError, match=said):
        check_fake_quant(geometry, parallel, asked["fake_quant"], asked["layer_spec"], asked["fp8_experts"])


def test_refused_before_anything_is_built_and_in_a_plan() -> None:
    geometry = Geometry.from_dict(toy_config("12b").written)
    with pytest.raises(UsageError, match="no multiple of 32"):
        Gemma4Provider(geometry, Parallel(tp=2), fake_quant="int4-g32")
    assert Gemma4Provider(geometry, Parallel(tp=2), fake_quant="fp8").config.fake_quant == "fp8"
    recipe = load_recipe("lora/12b", ["data.path=x", "model.fake_quant=int3"])
    with pytest.raises(UsageError, match="fake_quant=int3"):
        plan_of(recipe, 1, table_for(geometry))


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_models_fit_blocks_in_the_layouts_of_the_recipes(variant: str) -> None:
    geometry = Geometry.from_dict(published(variant))
    entries = [entry for entry in table_for(geometry).entries.values() if entry.is_layer_linear]
    for name in NAMES:
        assert len(fake_quantized(geometry, name)) == len(entries)
        for tp in (1, 2):
            check_fake_quant(geometry, Parallel(tp=tp, sequence_parallel=tp > 1), name, "local", False)


def test_rounded_copies_are_in_the_estimate() -> None:
    table = table_for(Geometry.from_dict(published("26b-a4b")))
    keys = [entry for entry in table.entries.values() if entry.is_layer_linear]
    elements = sum(math.prod(entry.shape) for entry in keys)
    sizes = Sizes(table.geometry, Parallel(), Load(1, 4096))
    assert elements == sum(sum(linear_weights(sizes, layer).values()) for layer in table.geometry.layers)
    recipe = load_recipe("sft/26b-a4b", ["data.path=x", "parallel.tp=1", "parallel.ep=1", "parallel.pp=1"])
    recipe.parallel.sequence_parallel, recipe.train.global_batch_size = False, 1
    added = {}
    moe = sum(linear_weights(sizes, layer)["moe"] for layer in table.geometry.layers)
    for recompute, modules, kept in (("none", [], elements), ("selective", ["moe"], elements - moe), ("full", [], 0)):
        recipe.parallel.recompute, recipe.parallel.recompute_modules = recompute, modules
        recipe.model.fake_quant = "none"
        plain = estimate(table, plan_of(recipe, 1, table))
        recipe.model.fake_quant = "int4-g32"
        found = estimate(table, plan_of(recipe, 1, table))
        assert "rounded weights" not in plain.activations
        assert found.activations["rounded weights"] == 2 * kept
        assert plain.persistent == found.persistent
        added[recompute] = found.peak - plain.peak
    assert 0 < added["full"] < added["selective"] < added["none"]
    # Frozen weights are rounded where they are.
    lora = load_recipe("lora/26b-a4b", ["data.path=x", "model.fake_quant=int4-g32"])
    assert not plan_of(lora, 1, table).load.fake_quant


def test_names_are_those_that_are_tested() -> None:
    assert tuple(FAKE_QUANT) == ("none", *NAMES)
    assert load_recipe("sft/e2b", ["data.path=x"]).model.fake_quant == "none"
