"""Asking an engine in a process of its own, and what transformers says to the same."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.verify.reference import load_hf

ROOT = Path(__file__).parents[2]
ENGINES = ROOT / ".venv-engines"
# Kernels of vLLM's CPU attention begin at 32, and these are the smallest of several engines. A busy machine is slow.
HEAD_DIM, SECONDS = 64, 1800
# The longer ones are of several windows (16); the shortest is within one.
LENGTHS, ANSWER = (55, 23, 9), 32
# Beside the adapter everything is as on a GPU, but slower; towers are not asked for text, and need memory.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "limit_mm_per_prompt": {"image": 0, "video": 0, "audio": 0},
    "enable_prefix_caching": False,
    "max_logprobs": -1,
}
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


@dataclass(frozen=True)
class Ask:
    """Prompts as token ids, served at a time. `adapters`: of every prompt its folder, None for the model as it is.

    `free`: answers may have any token; else none that `placeholders` gives.
    `inputs_file`: where to write what goes into linears of FP8 weights, for one prompt and one token of an answer.
    """

    ids: Sequence[Sequence[int]]
    adapters: Sequence[str | None] = ()
    max_tokens: int = ANSWER
    free: bool = False
    inputs_file: str | None = None


@dataclass(frozen=True)
class Answer:
    """To one prompt: `logprobs` [tokens - 1, vocabulary] of every token but the first, and the greedy answer.

    `following` [vocabulary], where it is known: of the token behind the prompt.
    """

    logprobs: Tensor
    tokens: list[int]
    following: Tensor | None = None


class EngineFailed(Exception):
    """The process ended otherwise than with an answer; what it said last."""


def ask_vllm(
    model: Path, asks: Sequence[Ask], workdir: Path, *, centroid_graphs: bool = True, **options: Any
) -> list[list[Answer]]:
    """What vLLM answers: for every ask, for every prompt. Raises EngineFailed with the end of what vLLM said.

    `centroid_graphs=False`: it records no CUDA graphs of a drafter's centroids, which a CPU cannot; what it computes is
    the same.
    """
    job, answer, said = (workdir / f"vllm-{name}" for name in ("job.json", "answer.json", "said.log"))
    job.write_text(
        json.dumps(
            {
                "model": str(model),
                "options": OPTIONS | options,
                "centroid_graphs": centroid_graphs,
                "asks": [asdict(ask) | {"never": [] if ask.free else placeholders(model)} for ask in asks],
            }
        )
    )
    worker = [str(ENGINES / "bin" / "python"), str(Path(__file__).with_name("vllm_worker.py"))]
    with said.open("w") as log:
        try:
            done = subprocess.run(
                [*worker, str(job), str(answer)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                timeout=SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise EngineFailed(f"no answer in {SECONDS} s; {_last(said)}") from error
    if done.returncode != 0:
        raise EngineFailed(_last(said))
    answers = json.loads(answer.read_text())
    return [[Answer(torch.tensor(one["logprobs"]), one["tokens"]) for one in of_ask] for of_ask in answers]


@dataclass(frozen=True)
class Server:
    """A server on this machine."""

    url: str

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}", timeout=SECONDS) as response:
            text = response.read()
        return json.loads(text) if text else None

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What it answers: JSON, or text. Raises EngineFailed with the server's own words."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                text = response.read().decode()
        except urllib.error.HTTPError as error:
            raise EngineFailed(f"{path}: {error.code} {error.read().decode(errors='replace')}") from error
        return json.loads(text) if text.startswith(("{", "[")) else text


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile: of a socket that does not listen, so that a server may bind it too.

    Servers ask for SO_REUSEADDR or SO_REUSEPORT, which both have to.
    """
    with socket.socket() as held:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            held.setsockopt(socket.SOL_SOCKET, option, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextmanager
def serving(
    command: Callable[[int], Sequence[str]], said: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """A server that a command starts on a free port, once its /health answers. Raises EngineFailed where it ends."""
    with reserved_port() as port, said.open("w") as log:
        process = subprocess.Popen(
            command(port),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )
        try:
            server = Server(f"http://127.0.0.1:{port}")
            end = time.monotonic() + SECONDS
            while not _is_up(server):
                if process.poll() is not None or time.monotonic() > end:
                    raise EngineFailed(_last(said))
                time.sleep(0.5)
            yield server
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            # Servers have processes of their own, which an end by force would leave behind.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_up(server: Server) -> bool:
    try:
        server.get("/health")
    except OSError:
        return False
    return True


def _last(said: Path) -> str:
    return "\n".join(said.read_text(errors="replace").splitlines()[-40:])


def prompts(folder: Path, seed: int = 0) -> list[list[int]]:
    """Ordinary tokens of several lengths, without placeholders."""
    geometry = Geometry.from_folder(folder)
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([i for i in range(8, geometry.vocab_size) if i not in geometry.placeholder_ids])
    return [allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist() for length in LENGTHS]


def placeholders(folder: Path) -> list[int]:
    """Tokens that no answer may have: without a picture transformers reads one as padding, and engines as itself."""
    return sorted(Geometry.from_folder(folder).placeholder_ids)


def expected(
    folder: Path,
    ids: Sequence[Sequence[int]],
    max_tokens: int = ANSWER,
    change: Callable[[torch.nn.Module], None] | None = None,
) -> list[Answer]:
    """What transformers says to the same prompts in float32, every token by a whole forward pass.

    `change`: what is done to its model before, where an engine is known to compute otherwise.
    """
    model = load_hf(folder, Geometry.from_folder(folder), torch.float32).eval()
    if change is not None:
        change(model)
    never = placeholders(folder)
    return [answered(model, {"input_ids": torch.tensor([prompt])}, max_tokens, never) for prompt in ids]


def answered(model: Any, inputs: Mapping[str, Tensor], max_tokens: int, never: Sequence[int]) -> Answer:
    """What a transformers model says to one prompt: `inputs` [1, prompt], and media beside them."""
    prompt, inputs = inputs["input_ids"].shape[1], dict(inputs)
    for _ in range(max_tokens):
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits[0]
        token = int(logits[-1].index_fill(0, torch.tensor(never, dtype=torch.int64), -torch.inf).argmax())
        for name, value in (("input_ids", token), ("attention_mask", 1), ("mm_token_type_ids", 0)):
            if name in inputs:
                inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)
    logprobs = logits.log_softmax(-1)
    return Answer(logprobs[: prompt - 1], inputs["input_ids"][0, prompt:].tolist(), logprobs[prompt - 1])


def furthest(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """The largest difference of a log-probability."""
    return max((a.logprobs - b.logprobs).abs().max().item() for a, b in zip(ours, theirs, strict=True))
