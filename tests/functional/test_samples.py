"""What a model says while it trains: `train.samples`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bridge.convert.manifest import MegatronFolder
from bridge.generate.sampling import SamplingOptions
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool

from .conftest import Toy
from .evaluation_kit import write_chats
from .generation_kit import answer, encode_prompts, run_recipe, task

PROMPTS = [{"prompt": "what"}, {"messages": [{"role": "user", "content": "the cat"}]}, {"ids": [5, 6, 7, 8]}]
CASES = {
    "e4b TP2+SP": ("e4b", ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "26b-a4b EP2, overlap": ("26b-a4b", ["parallel.ep=2", "parallel.overlap=true"]),
    "e2b PP2": ("e2b", ["parallel.pp=2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_live_model_answers_and_trains_on(ranks: RankPool, toy: Toy, tmp_path: Path, case: str) -> None:
    """The same losses to the last bit as without; the answers are those of the checkpoint of that step."""
    variant, layout = CASES[case]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    data = write_chats(tmp_path / "chats.jsonl", 24, seed=0)
    said: dict[str, Any] = {
        "model": {"hf": str(toy(variant)), "dtype": "float32"},
        "data": {"path": str(data), "eval": str(data), "cache": str(tmp_path / "cache")},
        "train": {"steps": 4, "global_batch_size": 4, "seq_length": 96, "eval_every": 2, "eval_rows": 4},
        "optimizer": {"lr": 1e-3},
    }
    with_samples = [f"train.samples={prompts}", "train.sample_tokens=10"]
    for name, keys in (("with", with_samples), ("without", [])):
        ranks.run(run_recipe, {**said, "output": str(tmp_path / name)}, [*layout, *keys], world_size=2)
    logs = {
        name: [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    }
    for key in ("loss", "grad_norm", "eval_loss"):
        values = {name: [line[key] for line in log if key in line] for name, log in logs.items()}
        assert values["with"] == values["without"] and values["with"]
    assert sorted(path.name for path in (tmp_path / "with" / "samples").iterdir()) == ["step-2.jsonl", "step-4.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "with" / "samples" / "step-4.jsonl").read_text().splitlines()]
    checkpoint = MegatronFolder.open(tmp_path / "with")
    asked = task(toy(variant), Parallel(), weights=checkpoint.weights, megatron=True)
    (encoded,) = ranks.run(encode_prompts, toy(variant), prompts, world_size=1)
    (found,) = ranks.run(
        answer, asked, encoded, SamplingOptions(max_new_tokens=10, stop_token_ids=(1, 106, 50)), world_size=1
    )
    assert [line["tokens"] for line in lines] == [list(completion.tokens) for completion in found.completions]
