"""vLLM on a CPU serves what is exported: log-probabilities and answers are those of transformers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from bridge.geometry import Geometry
from bridge.lora.merge import merge_adapter
from bridge.lora.peft_folder import write_peft
from bridge.lora.source import open_both, open_megatron, open_with_table
from bridge.ranks import RankPool
from bridge.toy import VARIANTS
from tests.engines.kit import HEAD_DIM, Answer, Ask, EngineFailed, ask_vllm, expected, furthest, prompts
from tests.functional.adapter_kit import make_adapter, save_run
from tests.functional.conftest import Toy
from tests.functional.test_lora_training import TEXT
from tests.functional.training_kit import recipe, train_toy

pytestmark = pytest.mark.engine

BOUND, APART = 1e-4, 0.1


def trained(ranks: RankPool, folder: Path, output: Path) -> Path:
    """The folder that a short run of all weights exports at its end."""
    said = recipe(folder, output / "run", steps=3) | {"export": {"hf": str(output / "trained")}}
    ranks.run(train_toy, said, [], world_size=1)
    return output / "trained"


def agree(served: list[Answer], folder: Path) -> float:
    """How far log-probabilities are from those of transformers on a folder. Greedy answers are the same."""
    theirs = expected(folder, prompts(folder))
    assert [answer.tokens for answer in served] == [answer.tokens for answer in theirs]
    return furthest(served, theirs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_model(ranks: RankPool, toy: Toy, variant: str, tmp_path: Path) -> None:
    base = toy(variant, head_dim=HEAD_DIM)
    folder = trained(ranks, base, tmp_path)
    (served,) = ask_vllm(folder, [Ask(prompts(folder))], tmp_path)
    difference = agree(served, folder)
    print(f"{variant}: {difference:.1e} from transformers")
    assert difference <= BOUND
    assert furthest(served, expected(base, prompts(base), max_tokens=1)) > APART


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_model(ranks: RankPool, toy: Toy, variant: str, tmp_path: Path) -> None:
    """What an adapter of everything is merged into: attention, FFN, experts, towers, embeddings."""
    base = toy(variant, head_dim=HEAD_DIM)
    ranks.run(save_run, base, tmp_path / "run", {}, {}, world_size=1)
    with ExitStack() as stack:
        model, adapter = open_both(stack, tmp_path / "run", None)
        merge_adapter(model, adapter, tmp_path / "merged")
    (served,) = ask_vllm(tmp_path / "merged", [Ask(prompts(base))], tmp_path)
    difference = agree(served, tmp_path / "merged")
    print(f"{variant}: {difference:.1e} from transformers")
    assert difference <= BOUND
    assert furthest(served, expected(base, prompts(base), max_tokens=1)) > APART


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters(ranks: RankPool, toy: Toy, variant: str, tmp_path: Path) -> None:
    """One of a run here, exported, and one of PEFT's, converted: at a time, each as what it is merged into.

    The base has a batch of its own: beside adapters vLLM's CPU kernels give it one of them (their number of it is -1,
    which in torch is the last).
    """
    base = toy(variant, head_dim=HEAD_DIM)
    ranks.run(save_run, base, tmp_path / "run", {}, {"targets": TEXT, "parameters": []}, world_size=1)
    make_adapter(base, tmp_path / "peft", target_modules=TEXT)
    with ExitStack() as stack:
        write_peft(tmp_path / "run-vllm", open_megatron(stack, tmp_path / "run"), adapter_format="vllm")
        write_peft(tmp_path / "peft-vllm", open_with_table(stack, tmp_path / "peft", None), adapter_format="vllm")
        for name in ("run", "peft"):
            model, adapter = open_both(stack, tmp_path / name, None)
            merge_adapter(model, adapter, tmp_path / f"{name}-merged")
    ours, theirs = (str(tmp_path / f"{name}-vllm") for name in ("run", "peft"))
    ids = prompts(base)
    asks = [Ask([*ids, *ids], [ours] * 3 + [theirs] * 3), Ask(ids)]
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    if Geometry.from_folder(base).moe is not None:
        # It makes room for adapters of experts, whatever an adapter has, and those are Triton's.
        with pytest.raises(EngineFailed, match=r"module 'triton.language' has no attribute"):
            ask_vllm(base, asks, tmp_path, **options)
        return
    both, plain = ask_vllm(base, asks, tmp_path, **options)
    of_base, of_ours, of_theirs = (expected(tmp_path / name, ids) for name in (base, "run-merged", "peft-merged"))
    for answers, models in ((both, [*of_ours, *of_theirs]), (plain, of_base)):
        difference = furthest(answers, models)
        print(f"{variant}: {difference:.1e} from transformers")
        assert difference <= BOUND
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in models]
    for one, other in ((of_base, of_ours), (of_base, of_theirs), (of_ours, of_theirs)):
        assert furthest(one, other) > APART
