"""A vLLM server beside a run: it is given the weights of the model under training, and answers prompts with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from bridge.errors import EngineError
from bridge.generate.loop import Decode
from bridge.generate.rows import Completion, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.sync.send import Sent
from bridge.sync.vllm import VllmSink
from bridge.together import together
from recipes.train.setup import Run
from recipes.train.signals import StopSignal
from recipes.train.step import any_rank

# An answer may take longer than what else a server is asked for.
_TIMEOUT_S = 3600.0


class ServedModel:
    """The model of a run in a vLLM server on rank 0's machine, with adapters merged into it. Collective, all of it.

    Raises EngineError, on every rank, where there is no such server, or it takes no weights.
    """

    def __init__(self, run: Run, url: str) -> None:
        self._run, self._sync = run, run.bridge.weight_sync(run.models)
        self._sink = VllmSink(url, run.bridge.geometry, timeout_s=_TIMEOUT_S) if self._sync.receives else None
        self._everything = True
        with together():
            if self._sink is not None:
                self._sink.server.check()

    def send(self, version: str) -> Sent:
        """The weights of the last update; what is frozen the first time, and after a failure. Collective."""
        self._run.gather_weights()
        if self._sink is not None:
            self._sink.version = version
        everything, self._everything = self._everything, True
        sent = self._sync.send(self._sink, everything=everything)
        self._everything = False
        return sent

    def answers(
        self,
        prompt: Callable[[int], Prompt],
        count: int,
        options: SamplingOptions,
        decode: Decode,
        signalled: StopSignal,
        max_rows: int,
        first_index: int,
    ) -> list[Completion] | None:
        """As `recipes.train.answers.answers`, of the server with the weights as they are: prompts without media.

        `max_rows`: answers that it is asked for at once.
        """
        self.send(f"prompt {first_index}")
        at_once, found = max(1, max_rows // options.num_return_sequences), list[Completion]()
        for first in range(0, count, at_once):
            if any_rank(bool(signalled), self._run.device):
                return None
            part: list[list[Completion]] = [[]]
            with together():
                if self._sink is not None:
                    numbers = range(first, min(count, first + at_once))
                    part[0] = self._asked([prompt(number) for number in numbers], options, decode, first_index + first)
            dist.broadcast_object_list(part, src=0)
            found += part[0]
        return found

    def _asked(
        self, prompts: Sequence[Prompt], options: SamplingOptions, decode: Decode, first_index: int
    ) -> list[Completion]:
        """The server is asked for all of them at a time."""
        assert self._sink is not None
        server, never = self._sink.server, sorted(self._run.bridge.geometry.placeholder_ids)
        (model, *_) = (each["id"] for each in server.get("/v1/models")["data"] if not each.get("parent"))
        bodies = [
            {"model": model} | _body(prompt, options, never, index) for index, prompt in enumerate(prompts, first_index)
        ]
        with ThreadPoolExecutor(len(bodies)) as threads:
            said = list(threads.map(lambda body: server.ask("/v1/completions", body), bodies))
        return [
            _completion(choice, index, prompt, decode)
            for index, (prompt, each) in enumerate(zip(prompts, said, strict=True), first_index)
            for choice in sorted(each["choices"], key=lambda choice: int(choice["index"]))
        ]


class WeightPushes:
    """What `sync.url` and `sync.every` ask for. Collective, all of it. Raises EngineError where there is no server."""

    def __init__(self, run: Run, url: str) -> None:
        self._every, self._last = run.recipe.sync.every, run.recipe.train.steps
        self._served = ServedModel(run, url)

    def after(self, step: int, say: Callable[[str], None]) -> None:
        """Send the weights where it is time. What fails is said, and does not end the run: the next time all goes."""
        if step % self._every and step != self._last:
            return
        try:
            self._served.send(f"step {step}")
        except EngineError as error:
            say(f"sync: the weights of step {step} were not taken: {error}")


def _body(prompt: Prompt, options: SamplingOptions, never: Sequence[int], index: int) -> dict[str, Any]:
    """A request for what `options` say, whatever defaults a server has from generation_config.json.

    `never`: placeholders of media, which are read otherwise there (embeddings like any others). Log-probabilities are
    the model's own, with them.
    """
    digest = hashlib.blake2b(f"{options.seed} {index}".encode(), digest_size=6).digest()
    return {
        "prompt": list(prompt.ids),
        "n": options.num_return_sequences,
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": 1.0 if options.top_p is None else options.top_p,
        "top_k": 0 if options.top_k is None else options.top_k,
        "min_p": 0.0 if options.min_p is None else options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "seed": int.from_bytes(digest),
        "stop_token_ids": list(options.stop_token_ids),
        "ignore_eos": True,
        "logit_bias": dict.fromkeys(map(str, never), -100),
        "logprobs": 0,
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def _completion(choice: Mapping[str, Any], index: int, prompt: Prompt, decode: Decode) -> Completion:
    tokens, logprobs = tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"])
    read, reason = tuple(choice["prompt_token_ids"]), str(choice["finish_reason"])
    if read != prompt.ids or len(tokens) != len(logprobs) or reason not in ("stop", "length"):
        raise EngineError(
            f"prompt {index}, answer {choice['index']}: {len(read)} of {len(prompt.ids)} tokens were read, and "
            f"{len(logprobs)} of {len(tokens)} answered have a log-probability; it ended by {reason!r}"
        )
    return Completion(index, int(choice["index"]), prompt.ids, tokens, logprobs, reason, decode(tokens))
