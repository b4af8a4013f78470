"""A model that answers from ranks of its own: the process that asks holds neither Megatron nor the weights.

Requests and what comes of them go through a folder of temporary files: a rank's output is a log, and a token is to be
seen when it is there. Of every replica one rank writes a line for each token and for each finished row.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bridge.errors import ParallelError
from bridge.generate.task import ModelTask, build_model, build_speculator

if TYPE_CHECKING:
    from bridge.generate.rows import Completion, Continuation, Likelihood, Prompt
    from bridge.generate.sampling import SamplingOptions
    from bridge.ranks import RankPool

_POLL_S = 0.02
# Ranks answer when the session ends, which may be days later.
_FOREVER_S = 1e6

OnToken = Callable[[int, int, int], None]


class Session:
    """A context manager: the ranks load the model when it is entered, and answer until it is left.

    `tokenizer` is a folder that has one: texts, and stop strings, come of it; None: tokens alone.
    """

    def __init__(self, pool: RankPool, task: ModelTask, tokenizer: Path | None, **settings: Any) -> None:
        """`settings` are those of `Generator` (`max_rows`, `prefill_tokens`)."""
        self._pool, self._task, self._tokenizer, self._settings = pool, task, tokenizer, settings
        self._requests = 0
        self._failure: BaseException | None = None

    def __enter__(self) -> Session:
        self._folder = Path(tempfile.mkdtemp(prefix="gemma4-generate-"))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        (self._folder / "stop").touch()
        if error[0] is None:
            self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _serve(self) -> None:
        world = self._task.parallel.world_size
        try:
            self._pool.run(
                answer_requests,
                self._task,
                self._folder,
                self._tokenizer,
                self._settings,
                world_size=world,
                timeout_s=_FOREVER_S,
            )
        except BaseException as failure:
            self._failure = failure

    def generate(
        self,
        prompts: Sequence[Prompt],
        options: SamplingOptions,
        *,
        first_index: int = 0,
        on_token: OnToken | None = None,
    ) -> Iterator[Completion]:
        """Completions as they are finished, in any order. Raises what a rank raised."""
        left = len(prompts) * options.num_return_sequences
        events = self._ask(("generate", list(prompts), options, first_index))
        while left:
            event = next(events)
            if "token" not in event:
                left -= 1
                yield _completion(event)
            elif on_token is not None:
                on_token(event["index"], event["sample"], event["token"])

    def score(self, rows: Sequence[Continuation]) -> Iterator[Likelihood]:
        """Likelihoods as they are known, in any order. Raises what a rank raised."""
        from bridge.generate.rows import Likelihood

        events = self._ask(("score", list(rows)))
        for _ in rows:
            yield Likelihood(**next(events))

    def _ask(self, request: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
        """What the ranks write about a request, without an end: who asks knows how much there will be."""
        number, self._requests = self._requests, self._requests + 1
        beside = self._folder / f"request{number}.partial"
        beside.write_bytes(pickle.dumps(request))
        beside.rename(self._folder / f"request{number}")
        places: dict[Path, int] = {}
        while True:
            ended = not self._thread.is_alive()
            yield from self._events(number, places)
            if ended:
                raise self._failure or ParallelError("the ranks have ended before the answers")
            time.sleep(_POLL_S)

    def _events(self, number: int, places: dict[Path, int]) -> Iterator[dict[str, Any]]:
        """The whole lines that have come since the last look."""
        for path in sorted(self._folder.glob(f"events{number}-*")):
            with path.open("rb") as file:
                file.seek(places.get(path, 0))
                data = file.read()
            end = data.rfind(b"\n") + 1
            places[path] = places.get(path, 0) + end
            for line in data[:end].splitlines():
                yield json.loads(line)


def _completion(event: dict[str, Any]) -> Completion:
    from bridge.generate.rows import Completion

    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in event.items()}
    if event["rounds"] is not None:
        fields["rounds"] = tuple(map(tuple, event["rounds"]))
    return Completion(**fields)


def answer_requests(task: ModelTask, folder: Path, tokenizer: Path | None, settings: dict[str, Any]) -> None:
    """On every rank: load the model, then answer one request after the other until the folder says stop."""
    import torch.distributed as dist

    from bridge.generate.loop import Generator
    from bridge.generate.scoring import score

    model, groups = build_model(task)
    speculator = build_speculator(task, model, groups)
    decode = None if tokenizer is None else _decoder(tokenizer)
    writes = groups.tp.rank() == groups.pp.rank() == 0
    number = 0
    while True:
        found = [_wait_for(folder, number) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(found, src=0)
        if found[0] is None:
            return
        kind, *request = found[0]
        with contextlib.ExitStack() as stack:
            on_token, on_finish = None, None
            if writes:
                events = stack.enter_context((folder / f"events{number}-{groups.dp_cp.rank()}").open("w", buffering=1))
                on_token, on_finish = partial(_write_token, events), partial(_write, events)
            if kind == "score":
                score(model, groups, *request, on_score=on_finish, **settings)
            else:
                listeners: dict[str, Any] = {"on_token": on_token, "on_finish": on_finish}
                generator = Generator(model, groups, decode=decode, speculator=speculator, **listeners, **settings)
                generator.generate(*request)
        number += 1


def _write(file: TextIO, found: Any) -> None:
    """A completion or a likelihood as a line."""
    print(json.dumps(asdict(found)), file=file)


def _write_token(file: TextIO, index: int, sample: int, token: int) -> None:
    print(json.dumps({"index": index, "sample": sample, "token": token}), file=file)


def _wait_for(folder: Path, number: int) -> Any:
    """Request `number`, or None where there will be no more."""
    path = folder / f"request{number}"
    while not path.exists():
        if (folder / "stop").exists() or not folder.exists():
            return None
        time.sleep(_POLL_S)
    return pickle.loads(path.read_bytes())


def _decoder(folder: Path) -> Callable[[Sequence[int]], str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True))
