"""vLLM on a CPU drafts with a drafter that is exported: greedy answers are those without it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridge.ranks import RankPool
from tests.engines.kit import HEAD_DIM, Ask, EngineFailed, ask_vllm, expected, prompts
from tests.functional.conftest import Toy
from tests.functional.drafter_kit import Pair, fit

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("variant", "ordered"), [("e2b", True), ("e2b", False), ("12b", False)])
def test_a_drafter(ranks: RankPool, toy: Toy, variant: str, ordered: bool, tmp_path: Path) -> None:
    """One that guesses some of the answers; ordered embeddings without the CUDA graphs that vLLM records of them."""
    base = toy(variant, head_dim=HEAD_DIM)
    pair = Pair(base, toy(variant, head_dim=HEAD_DIM, drafter=True, ordered=ordered))
    ids = prompts(base)
    answers = [answer.tokens for answer in expected(base, ids)]
    rows = [[*prompt, *answer[:20]] for prompt, answer in zip(ids, answers, strict=True)]
    ranks.run(fit, pair, rows, tmp_path / "drafter", 60, world_size=1)
    drafting = {"model": str(tmp_path / "drafter"), "num_speculative_tokens": 3}
    ask = Ask(ids, free=True)
    (without,) = ask_vllm(base, [ask], tmp_path)
    options = {"speculative_config": drafting, "disable_log_stats": False}
    (drafted,) = ask_vllm(base, [ask], tmp_path, centroid_graphs=not ordered, **options)
    counts = json.loads((tmp_path / "vllm-counts.json").read_text())
    accepted, proposed = (counts[f"vllm:spec_decode_num_{name}_tokens"] for name in ("accepted", "draft"))
    print(f"{variant}: {accepted} of {proposed} tokens accepted")
    assert [answer.tokens for answer in drafted] == [answer.tokens for answer in without]
    assert 0 < accepted < proposed


def test_ordered_embeddings_need_a_gpu(toy: Toy, tmp_path: Path) -> None:
    """vLLM 0.32 records CUDA graphs for their centroids, on a CPU too."""
    base, drafter = (toy("e2b", head_dim=HEAD_DIM, **more) for more in ({}, {"drafter": True}))
    drafting = {"model": str(drafter), "num_speculative_tokens": 3}
    with pytest.raises(EngineFailed, match="_setup_centroids_cuda_graphs"):
        ask_vllm(base, [Ask(prompts(base), free=True)], tmp_path, speculative_config=drafting)
