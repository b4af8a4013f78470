"""The choice of a layer spec: what is refused, what goes to Megatron, and what Megatron's TE classes are called with.

Transformer Engine is not installed where these run: its own part is tested by nothing here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron import parts
from bridge.megatron.linear import ColumnLinear, RowLinear
from bridge.megatron.provider import Gemma4Provider
from bridge.toy.config import toy_config
from recipes.config import check_recipe, load_recipe, row_multiple

GEOMETRY = Geometry.from_dict(toy_config("26b-a4b").written)


def provider(**options: Any) -> Gemma4Provider:
    return Gemma4Provider(GEOMETRY, **options)


def test_local_is_the_default() -> None:
    assert parts.parts("local") == parts.Parts(ColumnLinear, RowLinear)
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


def signature(name: str) -> inspect.Signature:
    """Of a TE class's `__init__` in the installed Megatron, from its source: without TE the class is a shell."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parent / "extensions" / "transformer_engine.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == name:
            (init,) = (f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
            space: dict[str, Any] = {}
            init.returns, init.body = None, [ast.Pass()]
            for argument in (*init.args.args, *init.args.kwonlyargs):
                argument.annotation = None
            exec(compile(ast.fix_missing_locations(ast.Module([init], [])), str(source), "exec"), space)
            return inspect.signature(space["__init__"])
    raise AssertionError(f"{source} has no {name}")


# What Megatron's attention and MLP pass (`test_layer_spec_parts.py` sees them do it).
COLUMN = {"config", "init_method", "gather_output", "bias", "skip_bias_add", "is_expert", "tp_comm_buffer_name",
          "tp_group", "name"}  # fmt: skip
ROW = COLUMN - {"gather_output"} | {"input_is_parallel"}


def test_megatron_calls_its_te_classes_the_same_way() -> None:
    for name, arguments in (("TEColumnParallelLinear", COLUMN | {"stride"}), ("TERowParallelLinear", ROW)):
        signature(name).bind(None, 64, 128, **dict.fromkeys(arguments))
    with pytest.raises(TypeError):
        signature("TERowParallelLinear").bind(None, 64, 128, **dict.fromkeys(COLUMN))
