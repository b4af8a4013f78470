"""What FP8 adds to the memory estimate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.mapping import Table, table_for
from bridge.megatron.parallel import Parallel
from bridge.toy.config import VARIANTS, published
from recipes.config import load_recipe
from recipes.memory.activations import Load, Sizes, backward_bytes, fp8_weight_bytes
from recipes.memory.estimate import estimate
from recipes.memory.recipe import plan_of

LINEARS = (
    ("self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"),
    (
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ),
)


def table(variant: str) -> Table:
    return table_for(Geometry.from_dict(published(variant)))


def elements(table: Table, layer: int, names: tuple[str, ...]) -> int:
    """Of a layer's weights, as a checkpoint has them."""
    keys = [f"decoder.layers.{layer}.{name}" for name in names]
    return sum(math.prod(table.entries[key].shape) for key in keys)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_bytes_for_each_weight_of_te_linears(variant: str, tp: int) -> None:
    made = table(variant)
    sizes = Sizes(made.geometry, Parallel(tp=tp, sequence_parallel=tp > 1), Load(1, 4096))
    for layer in made.geometry.layers:
        expected = [2 * elements(made, layer.index, names) // tp for names in LINEARS]
        assert list(fp8_weight_bytes(sizes, layer)) == expected


def test_they_are_kept_from_the_forward_to_the_backward_pass_unless_recomputed() -> None:
    made = table("12b")
    layers = range(made.geometry.num_layers)
    attention, mlp = (2 * sum(elements(made, i, names) for i in layers) for names in LINEARS)
    recipe = load_recipe("lora/12b", ["data.path=x", "model.layer_spec=te", "parallel.pp=1", "parallel.tp=1"])
    recipe.parallel.cp, recipe.parallel.sequence_parallel = 1, False
    recipe.train.global_batch_size = recipe.train.micro_batch_size = 1
    added = {}
    for recompute, modules, kept in (
        ("none", [], attention + mlp),
        ("selective", ["core_attn", "mlp"], attention),
        ("full", [], 0),
    ):
        recipe.parallel.recompute, recipe.parallel.recompute_modules = recompute, modules
        recipe.model.fp8 = "none"
        plain = estimate(made, plan_of(recipe, 1, made))
        recipe.model.fp8 = "block"
        fp8 = estimate(made, plan_of(recipe, 1, made))
        assert "fp8 weights" not in plain.activations
        assert fp8.activations["fp8 weights"] == kept
        assert plain.persistent == fp8.persistent
        added[recompute] = fp8.peak - plain.peak
    # Recomputed, one layer's at a time, and its gradients.
    layer = made.geometry.layers[0]
    gradients = 4 * recipe.train.seq_length * layer.ffn_hidden_size
    largest = max(2 * elements(made, i, LINEARS[0] + LINEARS[1]) for i in layers)
    assert 0 < added["full"] <= largest + gradients < added["selective"] < added["none"]


def test_experts_are_rounded_for_one_product_at_a_time() -> None:
    made = table("26b-a4b")
    moe, layer, rows = made.geometry.moe, made.geometry.layers[0], 65_536
    assert moe is not None
    load, parallel = Load(1, rows), Parallel(ep=4, etp=2)
    plain = backward_bytes(Sizes(made.geometry, parallel, load), layer)
    fp8 = backward_bytes(Sizes(made.geometry, parallel, replace(load, fp8_experts=True)), layer)
    width = moe.ffn_hidden_size // 2
    gradients, weights = rows * moe.topk * 2 * 2 * width, moe.num_experts // 4 * 2 * width * made.geometry.hidden_size
    assert fp8 - plain == gradients + weights
    recipe = load_recipe("lora/26b-a4b", ["data.path=x", "model.fp8_experts=true"])
    world = recipe.parallel.layout().world_size
    assert plan_of(recipe, world, made).load.fp8_experts and not plan_of(recipe, world, made).load.fp8
    # Said where nothing is built.
    with pytest.raises(UsageError, match="for models with experts, and this one has none"):
        plan_of(recipe, world, table("31b"))
    recipe.model.dtype = "float32"
    with pytest.raises(UsageError, match="needs a model in bfloat16, this one is float32"):
        plan_of(recipe, world, made)
