"""vLLM's OpenAI-compatible server, and its answers as those of transformers are held."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from tests.engines.kit import ANSWER, ENGINES, ENVIRONMENT, Answer, Server, serving

# What of the options of `kit.OPTIONS` a server is told, and that it takes adapters while it runs.
FLAGS = ("--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching", "--max-logprobs", "-1")
SERVER_ENVIRONMENT = ENVIRONMENT | {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "HF_HUB_OFFLINE": "1",
}


def vllm_server(
    model: Path, said: Path, *flags: str, media: Mapping[str, Any] | None = None
) -> AbstractContextManager[Server]:
    """A server of a folder, by the name "base". `media`: how many of each kind a prompt may have; what it says: `said`.

    The command `vllm serve` of the package for CPUs ends with an error; this is the server that it would start.
    """
    limits = json.dumps({"image": 0, "video": 0, "audio": 0} | dict(media or {}))
    python = [str(ENGINES / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    named = ["--model", str(model), "--served-model-name", "base", "--limit-mm-per-prompt", limits]
    return serving(
        lambda port: [*python, *named, "--host", "127.0.0.1", "--port", str(port), *FLAGS, *flags],
        said,
        SERVER_ENVIRONMENT,
    )


def asking(never: Sequence[int], max_tokens: int = ANSWER, to_the_end: bool = True) -> dict[str, Any]:
    """The body of a request for a greedy answer and every log-probability. `never`: tokens that no answer may have."""
    return {
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": to_the_end,
        "prompt_logprobs": -1,
        "return_token_ids": True,
        "logit_bias": dict.fromkeys(map(str, never), -100),
    }


def complete(server: Server, model: str, ids: Sequence[int], never: Sequence[int], max_tokens: int = ANSWER) -> Answer:
    """To token ids, by /v1/completions."""
    body = {"model": model, "prompt": list(ids)} | asking(never, max_tokens)
    (choice,) = server.post("/v1/completions", body)["choices"]
    return Answer(_logprobs(choice), choice["token_ids"])


def chat(server: Server, model: str, messages: Sequence[Any], **body: Any) -> tuple[list[int], Answer, dict[str, Any]]:
    """To messages, by /v1/chat/completions: what they became, the answer, and its message."""
    said = server.post("/v1/chat/completions", {"model": model, "messages": list(messages)} | body)
    (choice,) = said["choices"]
    return said["prompt_token_ids"], Answer(_logprobs(said), choice["token_ids"]), choice["message"]


def _logprobs(said: Mapping[str, Any]) -> torch.Tensor:
    rows = said["prompt_logprobs"][1:]
    return torch.tensor([[row[str(token)]["logprob"] for token in range(len(row))] for row in rows])
