"""The choice of a layer spec: what is refused, what goes to Megatron, and what Megatron's TE classes are called with.

Transformer Engine is not installed where these run: its own part is tested by nothing here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron import layer_options, te_linear
from bridge.megatron.linear import ColumnLinear, RowLinear
from bridge.megatron.provider import Gemma4Provider
from bridge.toy.config import toy_config
from recipes.check import check_recipe, row_multiple
from recipes.config import load_recipe

GEOMETRY = Geometry.from_dict(toy_config("26b-a4b").written)


def provider(**options: Any) -> Gemma4Provider:
    return Gemma4Provider(GEOMETRY, **options)


def test_local_is_the_default() -> None:
    assert layer_options.layer_linears("local") == layer_options.LayerLinears(ColumnLinear, RowLinear)
    config = provider().config
    assert config.layer_spec == "local" and config.fp8 is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer_spec": "apex"}, "layer_spec=apex: is one of local, te"),
        ({"fp8": "delayed"}, "fp8=delayed: is one of none, current, block"),
        ({"fp8": "current"}, "fp8=current needs layer_spec=te"),
        ({"layer_spec": "te"}, r"Transformer Engine is not installed; pip install 'gemma4-bridge\[te\]'"),
    ],
)
def test_refused_before_anything_is_built(options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=said):
        provider(**options)


def test_transformer_engine_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="runs on a GPU, and none is visible"):
        provider(layer_spec="te")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    provider(layer_spec="te", dtype=torch.float32)
    with pytest.raises(UsageError, match="fp8=block needs a model in bfloat16, this one is float32"):
        provider(layer_spec="te", fp8="block", dtype=torch.float32)


@pytest.mark.parametrize(
    ("fp8", "fields"),
    [("none", (None, "delayed")), ("current", ("hybrid", "tensorwise")), ("block", ("e4m3", "blockwise"))],
)
def test_what_fp8_is_called_in_megatron(fp8: str, fields: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A model without experts: for one with, Megatron asks the package's version here.
    config = replace(provider(layer_spec="te", fp8=fp8), geometry=Geometry.from_dict(toy_config("31b").written)).config
    assert (config.fp8, config.fp8_recipe) == fields
    assert not config.fp8_param and not config.fp8_output_proj and not config.fp8_dot_product_attention
    assert config.disable_parameter_transpose_cache == (fp8 != "none")


def test_recipes_say_it_too() -> None:
    recipe = load_recipe("lora/12b", ["model.layer_spec=te", "model.fp8=current", "data.path=x"])
    check_recipe(recipe, 1)
    assert row_multiple(recipe) == 16
    assert row_multiple(load_recipe("lora/12b", ["parallel.cp=2", "model.layer_spec=te", "model.fp8=block"])) == 64
    recipe.train.seq_length = 8200
    with pytest.raises(UsageError, match=r"no multiple of 16, as .* and model.fp8=current; 8208 would work"):
        check_recipe(recipe, 1)
    with pytest.raises(UsageError, match="fp8=current needs layer_spec=te"):
        check_recipe(load_recipe("lora/12b", ["model.fp8=current"]), 1)
    with pytest.raises(UsageError, match="layer_spec=t: is one of"):
        check_recipe(load_recipe("lora/12b", ["model.layer_spec=t"]), 1)


def method(class_name: str, name: str) -> ast.FunctionDef:
    """Of a TE class in the installed Megatron, from its source: without TE the class is a shell."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "extensions" / "transformer_engine.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            (found,) = (f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == name)
            found.returns = None
            for argument in (*found.args.args, *found.args.kwonlyargs):
                argument.annotation = None
            return found
    raise AssertionError(f"{source} has no {class_name}")


def defined(node: ast.stmt, space: dict[str, Any]) -> dict[str, Any]:
    exec(compile(ast.fix_missing_locations(ast.Module([node], [])), "transformer_engine.py", "exec"), space)
    return space


def signature(name: str) -> inspect.Signature:
    """Of a TE class's `__init__`."""
    init = method(name, "__init__")
    init.body = [ast.Pass()]
    return inspect.signature(defined(init, {})["__init__"])


# What Megatron's attention and MLP pass (`test_layer_spec_parts.py` sees them do it).
COLUMN = {
    "config",
    "init_method",
    "gather_output",
    "bias",
    "skip_bias_add",
    "is_expert",
    "tp_comm_buffer_name",
    "tp_group",
    "name",
}
ROW = COLUMN - {"gather_output"} | {"input_is_parallel"}


def test_megatron_calls_its_te_classes_the_same_way() -> None:
    for name, arguments in (("TEColumnParallelLinear", COLUMN | {"stride"}), ("TERowParallelLinear", ROW)):
        signature(name).bind(None, 64, 128, **dict.fromkeys(arguments))
    with pytest.raises(TypeError):
        signature("TERowParallelLinear").bind(None, 64, 128, **dict.fromkeys(COLUMN))


@pytest.mark.parametrize("cached", [True, False])
def test_weights_are_rounded_for_each_product(cached: bool) -> None:
    """Megatron's own forward, of which Transformer Engine takes None as: round the weight now, and keep no copy."""

    class Linear:
        """As far as Megatron's asks for it."""

        te_quant_params, training, te_return_bias, is_first_microbatch = None, True, False, True
        disable_parameter_transpose_cache = not cached

        def forward(self, x: Any, is_first_microbatch: bool | None) -> Any:
            return is_first_microbatch

    node = ast.parse("class TELinear(Linear): ...").body[0]
    assert isinstance(node, ast.ClassDef)
    node.body = [method("TELinear", "forward")]
    context = {"Linear": Linear, "_get_fp8_autocast_for_quant_params": lambda *_: nullcontext()}
    linear = defined(node, context)["TELinear"]()
    found = [linear.forward(None)[0] for _ in range(2)]
    # Cached, the second product would be with the weights of the first, whatever has become of them.
    assert found == ([True, False] if cached else [None, None])


def test_an_adapter_is_given_no_empty_bias() -> None:
    class Linear(torch.nn.Module):
        """Without a bias Transformer Engine's has a tensor of nothing."""

        config = SimpleNamespace(fp8=None)

        def __init__(self, bias: torch.Tensor) -> None:
            super().__init__()
            self.weight, self.bias = torch.eye(2), bias

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return x, None

    class Adapter(torch.nn.Module):
        def forward(self, x: Any, output: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
            given.append(bias)
            return output + 1

    given: list[torch.Tensor | None] = []
    made, _ = te_linear.quantizable(Linear, Linear)
    for bias in (torch.empty(0), torch.ones(2)):
        linear = made(bias)
        linear.adapters["weight"] = Adapter()
        assert torch.equal(linear(torch.zeros(2))[0], torch.ones(2))
    assert given[0] is None and given[1] is not None and torch.equal(given[1], torch.ones(2))
