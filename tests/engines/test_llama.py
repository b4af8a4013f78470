"""llama.cpp's own converter takes exported folders, and its answers are those of transformers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.ranks import RankPool
from tests.engines.kit import ANSWER, ENGINES, HEAD_DIM, SECONDS, expected, placeholders, prompts, serving
from tests.engines.test_vllm import trained
from tests.functional.conftest import Toy

pytestmark = pytest.mark.engine
NEEDS = ".venv-engines/bin/llama-server"

# What a table of float16 makes of GELU, at most.
ROUNDING = 5e-3


def gguf(folder: Path, target: Path) -> Path:
    """The folder in float32, as llama.cpp's converter makes it."""
    converter = [str(ENGINES / "bin" / "python"), str(ENGINES / "llama.cpp" / "convert_hf_to_gguf.py")]
    done = subprocess.run(
        [*converter, str(folder), "--outtype", "f32", "--outfile", str(target)],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def gelu_of_ggml(model: torch.nn.Module) -> None:
    """ggml looks GELU up in a table: of float16, to float16 (GGML_GELU_FP16 in ggml-cpu/vec.h), between -10 and 10."""

    def looked_up(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, table))

    found = [module for module in model.modules() if type(module).__name__ == "GELUTanh"]
    assert found
    for module in found:
        module.register_forward_hook(looked_up)


@pytest.mark.parametrize("variant", ["e2b", "e4b", "26b-a4b"])
def test_a_trained_model(ranks: RankPool, toy: Toy, variant: str, tmp_path: Path) -> None:
    """Greedy answers of 32 tokens are the same.

    The next token's log-probabilities differ by the table of float16 in which ggml looks GELU up. With that table in
    transformers little is left of it: what inputs on a tie between two of its entries make.
    """
    folder = trained(ranks, toy(variant, head_dim=HEAD_DIM), tmp_path)
    file, ids = gguf(folder, tmp_path / "model.gguf"), prompts(folder)

    def command(port: int) -> list[str]:
        exact = ["--flash-attn", "off", "--cache-type-k", "f32", "--cache-type-v", "f32"]
        place = ["--host", "127.0.0.1", "--port", str(port), "--ctx-size", "512", "--parallel", "1", "--threads", "1"]
        return [str(ENGINES / "bin" / "llama-server"), "--model", str(file), *place, *exact]

    asked: dict[str, Any] = {
        "n_predict": ANSWER,
        "temperature": -1,
        "n_probs": 512,
        "return_tokens": True,
        "cache_prompt": False,
    }
    never = placeholders(folder)
    asked["logit_bias"] = [[token, False] for token in never]
    with serving(command, tmp_path / "llama.log") as server:
        served = [server.post("/completion", {"prompt": prompt, **asked}) for prompt in ids]
    theirs, rounded = expected(folder, ids), expected(folder, ids, 1, gelu_of_ggml)
    differences = []
    for answer, plain, as_ggml in zip(served, theirs, rounded, strict=True):
        # It stops at the end of a turn, and does not give that token.
        assert answer["stop_type"] in ("limit", "eos")
        assert len(answer["tokens"]) == ANSWER or answer["stop_type"] == "eos"
        assert answer["tokens"] == plain.tokens[: len(answer["tokens"])]
        first = answer["completion_probabilities"][0]
        if first["id"] != answer["tokens"][0]:
            continue  # it leaves out tokens that are a part of a character
        logprobs = {one["id"]: one["logprob"] for one in first["top_logprobs"]}
        kept = [token for token in range(plain.following.shape[-1]) if token not in never]
        row = torch.tensor([logprobs[token] for token in kept]).log_softmax(-1)
        theirs_of = [model.following[kept].log_softmax(-1) for model in (plain, as_ggml)]
        differences.append([(row - other).abs().max().item() for other in theirs_of])
    plain_difference, difference = (max(column) for column in zip(*differences, strict=True))
    print(f"{variant}: {plain_difference:.1e} from transformers, {difference:.1e} with GELU in float16")
    assert difference < plain_difference <= ROUNDING
