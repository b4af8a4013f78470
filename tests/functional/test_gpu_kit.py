"""The helpers of the GPU tests, on a CPU with toys, so that they are known to run."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from benchmarks.case import Case
from benchmarks.random_model import RandomModel
from bridge.ranks import RankPool
from bridge.toy.config import VARIANTS, published, shallow
from bridge.verify.parity import LOGITS_RELATIVE

from . import gpu_kit

TOY = Case("e2b", "lora", 96, recompute="full", size="toy", dtype="float32")


@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_parity(ranks: RankPool, variant: str) -> None:
    model = RandomModel(variant, torch.float32, "toy")
    (found,) = ranks.run(gpu_kit.logits_distance, model, 40, "local", 7, world_size=1)
    assert found.relative < LOGITS_RELATIVE and found.kl < 1e-9


def test_deterministic_runs_are_alike(ranks: RankPool) -> None:
    (first,), (second,) = (ranks.run(gpu_kit.trained, TOY, 3, world_size=1) for _ in range(2))
    assert first[0] == second[0] and len(set(first[0])) == 3
    assert len(first[1]) == len(second[1]) > 50
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_memory_is_flat(ranks: RankPool) -> None:
    (found,) = ranks.run(gpu_kit.memory_after_steps, TOY, 4, world_size=1)
    assert len(found) == 4 and found[1] == found[3] > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_shallow_models_keep_widths_and_sharing(variant: str) -> None:
    whole, cut = published(variant), RandomModel(variant, torch.float32, "shallow").geometry
    kinds = {layer.kind for layer in cut.layers}
    assert (
        kinds == {"sliding", "global"} and cut.num_layers == shallow(variant)["text_config"]["num_hidden_layers"] < 13
    )
    assert (cut.hidden_size, cut.vocab_size) == (whole["text_config"]["hidden_size"], 262_144)
    shared = {layer.kind for layer in cut.layers if layer.shares_kv}
    assert shared == (kinds if variant in ("e2b", "e4b") else set())


def per_layer_gradients(case: Case) -> tuple[int, bool]:
    """Operations of a step that spread a slice's gradient over a tensor, and whether the slices take one."""
    run = gpu_kit.build(case)
    taken: list[bool] = []
    for layer in run.models[0].decoder.layers:
        layer.register_forward_pre_hook(lambda _, args: taken.append(args[3].requires_grad))
    with gpu_kit.Operations() as found:
        gpu_kit.forward_and_backward(run, list(islice(case.batches(), run.microbatches)))
    assert len(taken) >= len(run.models[0].decoder.layers)
    return sum(found.names[name] for name in ("select_backward", "slice_backward")), any(taken)


@pytest.mark.parametrize("mode", ["sft", "lora"])
def test_per_layer_inputs_cost_one_gradient_or_none(ranks: RankPool, mode: str) -> None:
    """A layer's slice by itself would have a gradient of the size of all layers; frozen, none is needed at all."""
    case = Case("e2b", mode, 96, recompute="full" if mode == "sft" else "none", size="toy", dtype="float32")
    ((spread, taken),) = ranks.run(per_layer_gradients, case, world_size=1)
    assert spread == 0
    assert taken == (mode == "sft")
