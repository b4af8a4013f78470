"""Models of the kernels against transformers. Run by test_kernels.py, as kernel_cases.py is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bridge.geometry import Geometry
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool
from bridge.toy import write_toy
from bridge.verify.on_ranks import run, run_reference
from bridge.verify.sample import VerificationSample, random_sample
from bridge.verify.task import ParityTask

from .kernel_kit import DEVICE


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2 if DEVICE == "cpu" else 1) as pool:
        yield pool


@pytest.mark.parametrize("variant", ["e2b", "26b-a4b"])
def test_a_model_of_kernels_is_that_of_transformers(ranks: RankPool, tmp_path: Path, variant: str) -> None:
    """Logits and gradients, float32, every layer recomputed; on CPUs split over two ranks.

    That is more ranks than E2B has K/V heads: each has half of the queries of the group. A few tokens only, because the
    interpreter is slow.
    """
    write_toy(variant, tmp_path / "toy", dtype="float32")
    geometry = Geometry.from_folder(tmp_path / "toy")
    whole, reference = random_sample(geometry, seed=0, batch=2), tmp_path / "reference.safetensors"
    sample = VerificationSample(whole.input_ids[:, -8:], whole.attention_mask[:, -8:], whole.labels[:, -8:])
    ranks.run(run_reference, tmp_path / "toy", sample, torch.float32, True, reference, world_size=1)
    parallel = Parallel(tp=ranks.size, sequence_parallel=ranks.size > 1)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    task = ParityTask(
        variant,
        geometry,
        tmp_path / "toy",
        False,
        parallel,
        torch.float32,
        sample,
        {"dtype": reference},
        overrides={"kernels": "triton"} | recompute,
    )
    checks = [check for rank in ranks.run(run, task) for check in rank]
    assert {f"{check.name} {check.metric}" for check in checks} >= {"logits relative", "gradients relative"}
    assert not [check for check in checks if not check.passed]
