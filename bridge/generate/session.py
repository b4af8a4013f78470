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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridge.errors import ParallelError
from bridge.generate.task import ModelTask, build_model, build_speculator

if TYPE_CHECKING:
    from bridge.generate.rows import Completion, Prompt
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
        number, self._requests = self._requests, self._requests + 1
        partial = self._folder / f"request{number}.partial"
        partial.write_bytes(pickle.dumps((list(prompts), options, first_index)))
        partial.rename(self._folder / f"request{number}")
        left = len(prompts) * options.num_return_sequences
        places: dict[Path, int] = {}
        while left:
            ended = not self._thread.is_alive()
            for event in self._events(number, places):
                if "token" in event:
                    if on_token is not None:
                        on_token(event["index"], event["sample"], event["token"])
                else:
                    left -= 1
                    yield _completion(event)
            if left and ended:
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
    fields["rounds"] = tuple(map(tuple, event["rounds"]))
    return Completion(**fields)


def answer_requests(task: ModelTask, folder: Path, tokenizer: Path | None, settings: dict[str, Any]) -> None:
    """On every rank: load the model, then answer one request after the other until the folder says stop."""
    import torch.distributed as dist

    from bridge.generate.loop import Generator

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
        prompts, options, first_index = found[0]
        with contextlib.ExitStack() as stack:
            listeners: dict[str, Any] = {}
            if writes:
                events = stack.enter_context((folder / f"events{number}-{groups.dp.rank()}").open("w", buffering=1))
                listeners = {
                    "on_token": lambda index, sample, token, file=events: print(
                        json.dumps({"index": index, "sample": sample, "token": token}), file=file
                    ),
                    "on_finish": lambda completion, file=events: print(json.dumps(asdict(completion)), file=file),
                }
            generator = Generator(model, groups, decode=decode, speculator=speculator, **listeners, **settings)
            generator.generate(prompts, options, first_index)
        number += 1


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
