"""Runs in .venv-engines: one vLLM engine in this process, asked by a file and answering by one.

`python vllm_worker.py JOB.json ANSWER.json`. A job is `{"model": folder, "options": {…}, "asks": [ask, …]}`, options of
vllm.LLM, and "centroid_graphs", see `ask_vllm`; fields of asks and answers are those of `Ask` and `Answer` in kit.py;
`never` are tokens that no answer has.
With a drafter, what vLLM counted is in vllm-counts.json beside the answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def main(job_file: str, answer_file: str) -> None:
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    from vllm import LLM

    if not job["centroid_graphs"]:
        from vllm.v1.spec_decode.gemma4 import Gemma4Proposer

        Gemma4Proposer._setup_centroids_cuda_graphs = lambda self: None
    llm = LLM(model=job["model"], **job["options"])
    numbers: dict[str, int] = {}
    answers = []
    for asked in job["asks"]:
        with recorded(llm, asked["inputs_file"]):
            answers.append(ask(llm, asked, numbers))
    if "speculative_config" in job["options"]:
        counts = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
        Path(answer_file).with_name("vllm-counts.json").write_text(json.dumps(counts), encoding="utf-8")
    Path(answer_file).write_text(json.dumps(answers), encoding="utf-8")


def ask(llm: Any, asked: dict[str, Any], numbers: dict[str, int]) -> list[dict[str, Any]]:
    """`numbers`: what adapters are called in this engine, by folder."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    def request(folder: str | None) -> LoRARequest | None:
        return None if folder is None else LoRARequest(folder, numbers.setdefault(folder, len(numbers) + 1), folder)

    never = dict.fromkeys(asked["never"], -100.0)
    params = SamplingParams(
        temperature=0, max_tokens=asked["max_tokens"], prompt_logprobs=-1, ignore_eos=True, logit_bias=never or None
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in asked["ids"]],
        params,
        lora_request=[request(folder) for folder in asked["adapters"] or [None] * len(asked["ids"])],
    )
    return [
        {"logprobs": [values(row) for row in output.prompt_logprobs[1:]], "tokens": list(output.outputs[0].token_ids)}
        for output in outputs
    ]


@contextmanager
def recorded(llm: Any, file: str | None) -> Iterator[None]:
    """Write what goes into every linear of FP8 weights, one matrix each by its name, to a safetensors file."""
    if file is None:
        yield
        return
    import torch
    from safetensors.torch import save_file

    inputs: dict[str, Any] = {}

    def watch(model: Any) -> list[Any]:
        def keep(name: str) -> Any:
            return lambda module, given: inputs.update({name: given[0].detach().clone()})

        return [
            module.register_forward_pre_hook(keep(name))
            for name, module in model.named_modules()
            if getattr(getattr(module, "weight", None), "dtype", None) == torch.float8_e4m3fn
        ]

    (hooks,) = llm.apply_model(watch)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    save_file(inputs, file)


def values(row: dict[int, Any]) -> list[float]:
    """The log-probabilities of a vocabulary, in its order."""
    return [row[token].logprob for token in range(len(row))]


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # After adapters vLLM's own end is a segmentation fault.
    os._exit(0)
