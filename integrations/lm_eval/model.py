"""`gemma4_bridge`: an `lm_eval` model class for whatever `generate` takes, where its weights are, in its layout."""

from __future__ import annotations

import atexit
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import AutoTokenizer

from bridge.close_on_exit import CloseOnExit
from bridge.errors import UsageError
from bridge.generate.memory import MAX_ROWS
from bridge.generate.opened import OpenedModel, open_model, stop_token_ids
from bridge.generate.rows import Continuation, Prompt
from bridge.generate.sampling import SamplingOptions
from bridge.generate.session import Session
from bridge.megatron.parallel import Parallel
from bridge.ranks import RankPool

log = logging.getLogger(__name__)

# What of a task's generation arguments goes to `SamplingOptions` under the same name.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("gemma4_bridge")
class Gemma4BridgeLM(TemplateLM, CloseOnExit):
    """`pretrained`: an HF folder or id, a Megatron checkpoint, a run; `adapter`: a PEFT folder or a Megatron adapter.

    `batch_size` rows go through at once on a replica, "auto": `max_batch_size`, or 16. Of `device` "cpu" is a demand;
    else ranks take a GPU each where there are enough. Raises UsageError for what is not understood.
    """

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        dtype: str = "bfloat16",
        tp: int = 1,
        pp: int = 1,
        vpp: int = 1,
        ep: int = 1,
        etp: int = 1,
        sequence_parallel: bool = False,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 0,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise UsageError(f"gemma4_bridge: unknown model argument {min(unknown)}")
        if dtype not in ("float32", "bfloat16"):
            raise UsageError(f"dtype={dtype}: float32 or bfloat16")
        parallel = Parallel(tp, pp, vpp, ep, etp, 1, sequence_parallel)
        self.opened = open_model(pretrained, adapter=adapter, parallel=parallel, dtype=dtype)
        for notice in self.opened.notices:
            log.warning(notice)
        self.tokenizer = AutoTokenizer.from_pretrained(
            self.opened.assets, trust_remote_code=False, local_files_only=True
        )
        self.max_length = max_length or self.opened.task.geometry.max_position_embeddings
        self.max_gen_toks, self.add_bos_token, self.seed = max_gen_toks, add_bos_token, seed
        self._prefix_token_id = prefix_token_id
        self._think_end_id = None if think_end_token is None else self._token(think_end_token)
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._template_args = (chat_template_args or {}) | thinking
        self._asked = 0
        rows = (max_batch_size or MAX_ROWS) if str(batch_size).startswith("auto") else int(batch_size)
        self._begin(self.opened, rows, device)

    def _begin(self, opened: OpenedModel, max_rows: int, device: str | None) -> None:
        if device is not None and device != "cpu" and not device.startswith("cuda"):
            raise UsageError(f"device={device}: cpu, or cuda, where each rank has a GPU of its own")
        world = opened.task.parallel.world_size
        threads = max(1, (os.cpu_count() or 1) // world)
        self._pool = RankPool(world, threads_per_rank=threads, device="cpu" if device == "cpu" else "auto")
        self._session = Session(self._pool, opened.task, opened.assets, max_rows=max_rows).__enter__()
        atexit.register(self.close)

    def close(self) -> None:
        """End the ranks, whatever they are at."""
        atexit.unregister(self.close)
        self._session.__exit__(SystemExit)
        self._pool.close()

    def _token(self, text: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(text)
        if found is None or found == self.tokenizer.unk_token_id:
            raise UsageError(f"think_end_token={text}: is no token of this model")
        return int(found)

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What the likelihood of a text without a context is behind."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """What caches of requests know it by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Token ids; a text that begins with the first token, as templates write it, gets no second one."""
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = False if begun else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self._template_args,
            )
        )

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            kept = self._shortened([*context, *continuation], self.max_length + 1)
            behind = len(continuation)
            rows.append(Continuation(tuple(kept[:-behind] if behind else kept), tuple(continuation)))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        scores = self._session.score(rows)
        for each in tqdm(scores, total=len(rows), disable=disable_tqdm, desc="loglikelihood"):
            found[each.index] = each.logprob, each.greedy
            if (said := requests[each.index][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", said, found[each.index])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts: in windows of the model's length, each token in one of them."""
        windows, of_request = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                of_request.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (logprob, _) in zip(of_request, scores, strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to what its task says ends one, without thoughts."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generate_until") as progress:
            for numbers in groups.values():
                of_group = [requests[number] for number in numbers]
                for place, answer in self._answers(of_group):
                    answers[numbers[place]] = answer
                    self.cache_hook.add_partial("generate_until", of_group[place].args, answer)
                    progress.update()
        return answers

    def _answers(self, requests: Sequence[Instance]) -> Iterator[tuple[int, str]]:
        """To requests with the same arguments: the place of each, and its answer."""
        options, until = self._sampling(requests[0].args[1])
        room = self.max_length - options.max_new_tokens
        if room < 1:
            raise UsageError(f"max_gen_toks={options.max_new_tokens}: the model takes {self.max_length} tokens in all")
        prompts = [Prompt(tuple(self._shortened(self.tok_encode(request.args[0]), room))) for request in requests]
        first, self._asked = self._asked, self._asked + len(prompts)
        for completion in self._session.generate(prompts, options, first_index=first):
            tokens = list(completion.tokens)
            if self._think_end_id in tokens:
                tokens = tokens[len(tokens) - tokens[::-1].index(self._think_end_id) :]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            thought = len(tokens) < len(completion.tokens)
            yield completion.index - first, postprocess_generated_text(text.lstrip() if thought else text, until, None)

    def _sampling(self, given: Mapping[str, Any]) -> tuple[SamplingOptions, list[str]]:
        """A task's generation arguments, and the texts that end an answer. Raises UsageError for what is not known."""
        said: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        until, sampled = [text for text in said.pop("until") if text], said.pop("do_sample")
        options = {name: said.pop(name) for name in _SAMPLING if name in said}
        tokens = said.pop("max_gen_toks")
        if said:
            raise UsageError(f"gemma4_bridge: unknown generation argument {min(said)}")
        if sampled and not options.get("temperature"):
            raise UsageError("do_sample: a temperature above 0 goes with it")
        # Control tokens are not in the text that stop strings are looked for in.
        control = self.tokenizer.get_added_vocab()
        ends = (*stop_token_ids(self.opened.assets), self.eot_token_id, *(control[t] for t in until if t in control))
        strings = tuple(text for text in until if text not in control)
        fixed: dict[str, Any] = {"stop_token_ids": tuple(dict.fromkeys(ends)), "stop_strings": strings}
        return SamplingOptions(tokens, seed=self.seed, **fixed, **options), until

    def _shortened(self, tokens: list[int], length: int) -> list[int]:
        """The last `length` tokens; what is lost is said."""
        if len(tokens) > length:
            log.warning("%d tokens, of which the model takes %d: the first are left out", len(tokens), length)
        return tokens[-length:]
