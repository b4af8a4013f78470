"""Experts in FP8 within the model: in every layout of experts, under adapters, and what checkpoints hold.

Operands are not rounded here and the product is by its definition, since the toys' widths fit no FP8 product and a CPU
has none: what is compared is all that is around the rounding. The rounding is in `tests/unit/test_fp8_experts.py`.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.verify.on_ranks import run
from bridge.verify.result import Check
from bridge.verify.task import ParityTask

from .conftest import References, Toy
from .test_parity import EXPERT_LAYOUTS, FULL, assert_passed

EXPERTS = {"fp8_experts": True}


def parity(task: ParityTask) -> tuple[list[Check], int]:
    """On a rank: a comparison with transformers, and how many products of experts there were."""
    from ..unit.fp8_products import exact_products

    with exact_products() as made:
        checks = run(replace(task, overrides=task.overrides | EXPERTS))
    return checks, len(made.asked)


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [("1 rank", {}), ("EP2", FULL), ("TP2+SP ETP2", {})],
    ids=["1 rank", "EP2 recomputed", "TP2+SP ETP2"],
)
def test_in_every_layout_of_experts(
    ranks: RankPool, references: References, toy: Toy, layout: str, overrides: dict[str, Any]
) -> None:
    folder = toy("26b-a4b")
    geometry = Geometry.from_folder(folder)
    parallel = EXPERT_LAYOUTS.get(layout, Parallel())
    task = ParityTask(
        folder.name,
        geometry,
        folder,
        False,
        parallel,
        torch.float32,
        references.sample(folder),
        {"dtype": references.file(folder)},
        overrides=overrides,
    )
    found = ranks.run(parity, task, world_size=parallel.world_size)
    assert_passed([check for checks, _ in found for check in checks], "logits relative", "gradients relative")
    # Two weights, forward (twice where it is recomputed) and backward, for each layer and micro batch.
    micro_batches = len(task.sample.input_ids) // task.micro_batch_size
    passes = 3 if overrides else 2
    replicas = parallel.world_size // parallel.tp
    assert {products for _, products in found} == {2 * passes * geometry.num_layers * micro_batches // replicas}


def with_adapters(folder: str) -> dict[str, Any]:
    """Outputs, gradients of experts' adapters and what a checkpoint holds, of both kinds of experts. On a rank."""
    from bridge import Gemma4Bridge
    from bridge.lora.initial import initial_values
    from bridge.lora.inject import attach, fill
    from bridge.lora.spec import LoraSpec
    from bridge.lora.table import adapter_table
    from bridge.lora.targets import resolve
    from bridge.megatron.parallel import initialize
    from bridge.verify.sample import random_sample

    from ..unit.fp8_products import exact_products

    bridge = Gemma4Bridge.from_hf(folder)
    initialize(bridge.provider().parallel)
    sample = random_sample(bridge.geometry, 0, batch=2)
    table = adapter_table(
        bridge.table, resolve(LoraSpec(4, 8.0, ("experts.gate_up_proj", "experts.down_proj")), bridge.table)
    )
    found: dict[str, Any] = {}
    state: dict[str, Any] | None = None
    for name, overrides in (("bf16", {}), ("fp8", EXPERTS)):
        provider = bridge.provider(dtype=torch.float32, overrides={"perform_initialization": False, **overrides})
        (model,) = provider.build()
        if state is None:
            bridge.load_hf_weights([model])
            state = model.state_dict()
        else:
            model.load_state_dict(state)
        attach([model], table)
        fill([model], table, initial_values(0))
        adapters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in adapters.values():
                parameter.add_(torch.randn_like(parameter) * 0.02)
        with ExitStack() as stack:
            made = stack.enter_context(exact_products())
            output = model(sample.input_ids, None, sample.attention_mask)
            output.square().mean().backward()
        sharded = model.sharded_state_dict()
        found[name] = {
            "keys": {key: (item.key, tuple(item.data.shape)) for key, item in sharded.items()},
            "output": output.detach(),
            "gradients": {key: parameter.grad for key, parameter in adapters.items()},
            "products": len(made.asked),
            "frozen": all(p.grad is None for p in model.parameters() if not p.requires_grad),
        }
    return found


def test_adapters_and_checkpoints_know_nothing_of_it(ranks: RankPool, toy: Toy) -> None:
    folder = toy("26b-a4b", text_only=True)
    (found,) = ranks.run(with_adapters, str(folder), world_size=1)
    plain, fp8 = found["bf16"], found["fp8"]
    layers = Geometry.from_folder(folder).num_layers
    # The adapters' own products are none of FP8's.
    assert (plain["products"], fp8["products"]) == (0, 2 * 2 * layers)
    assert plain["keys"] == fp8["keys"] and any("experts" in key and "lora_A" in key for key in fp8["keys"])
    assert plain["frozen"] and fp8["frozen"]
    torch.testing.assert_close(fp8["output"], plain["output"], rtol=1e-6, atol=1e-6)
    assert len(fp8["gradients"]) == 4 * layers
    for key, gradient in fp8["gradients"].items():
        expected = plain["gradients"][key]
        assert expected.any() and (gradient - expected).norm() <= 1e-5 * expected.norm(), key


def said_of_a_recipe(folder: str) -> str:
    """On a rank."""
    from bridge.errors import UsageError
    from recipes.config import resolve
    from recipes.train.setup import build

    recipe = {"output": "x", "model": {"hf": folder, "fp8_experts": True}, "train": {"steps": 1}}
    try:
        build(resolve(recipe), load=False)
    except UsageError as error:
        return str(error)
    return "nothing"


def test_recipes_ask_for_it(ranks: RankPool, toy: Toy) -> None:
    (said,) = ranks.run(said_of_a_recipe, str(toy("26b-a4b", text_only=True)), world_size=1)
    assert said == "fp8_experts=true: experts' width at etp=1 is 24, no multiple of 16"
