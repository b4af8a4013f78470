"""What full recompute keeps for the backward pass, and what it repeats at a time: counted, not computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel, initialize
from bridge.ranks import RankPool
from bridge.verify.sample import random_sample

from .conftest import Toy


class Held:
    """A tensor that autograd has saved, counted while it is."""

    now = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Held.now += tensor.nbytes
        Held.most = max(Held.most, Held.now)

    def __del__(self) -> None:
        Held.now -= self.tensor.nbytes


def held(folder: Path, method: str | None, layers: int) -> tuple[int, int]:
    """On a rank: bytes that are saved when the forward pass ends, and the most at any time up to the backward's end."""
    from bridge.megatron.provider import Gemma4Provider

    geometry = Geometry.from_folder(folder)
    recompute: dict[str, Any] = {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": layers,
    }
    provider = Gemma4Provider(geometry, Parallel(), torch.float32, overrides=recompute if method else {})
    (model,) = provider.build(initialize(Parallel()))
    model.train()
    sample = random_sample(geometry, 0)
    Held.now = Held.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        logits = model(sample.input_ids, None, sample.attention_mask)
        kept = Held.now
        logits.sum().backward()
    return kept, Held.most


@pytest.mark.parametrize("variant", ["31b", "e2b"])
def test_block_repeats_its_layers_singly(ranks: RankPool, toy: Toy, variant: str) -> None:
    folder = toy(variant)
    count = Geometry.from_folder(folder).num_layers

    def of(method: str | None, layers: int) -> tuple[int, int]:
        (bytes_held,) = ranks.run(held, folder, method, layers, world_size=1)
        return bytes_held  # type: ignore[no-any-return]

    everything, singly, half, as_one = of(None, 0), of("uniform", 1), of("block", count // 2), of("uniform", count)
    assert of("block", count) == singly
    assert as_one[0] < singly[0] < half[0] < everything[0]
    # Their peaks: what one layer needs, half of the layers, all of them.
    assert singly[1] < half[1] < everything[1]
