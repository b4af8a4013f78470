"""Answers of a vLLM server for GRPO: its log-probabilities are the trainer's after every update, of adapters too."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from bridge.errors import EngineError
from bridge.ranks import RankPool
from tests.engines.kit import HEAD_DIM
from tests.engines.test_vllm_sync import ask, expected, furthest, prompts, vllm
from tests.functional.conftest import Toy
from tests.functional.evaluation_kit import train_told
from tests.functional.reinforcement_kit import LORA, logged, recipe, train_sampling, write_questions
from tests.functional.training_kit import recipe as plain

pytestmark = pytest.mark.engine

BOUND, APART, STEPS = 1e-4, 0.1, 3
# All weights on two ranks; then adapters on one, merged on the way: the server is given its base's weights back.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "all, TP2+SP": (2, {"parallel": {"tp": 2, "sequence_parallel": True}}),
    "LoRA": (1, {"lora": LORA, "sync": {"every": 5}}),
}


def test_its_answers_are_of_the_weights_as_they_are(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    base, data = toy("e4b", head_dim=HEAD_DIM), write_questions(tmp_path / "questions.jsonl", 6)
    options = ["--weight-transfer-config", json.dumps({"backend": "gemma4_bridge"}), "--enable-prefix-caching"]
    with vllm(base, tmp_path / "vllm.log", options, {"VLLM_SERVER_DEV_MODE": "1"}) as server:
        for name, (world, more) in CASES.items():
            output, exported = tmp_path / name, tmp_path / f"{name} exported"
            said = recipe(base, data, output) | more | {"export": {"hf": str(exported)}}
            said["grpo"] |= {"engine": "vllm", "engine_url": server.url}
            pushed = said.get("sync")
            if pushed is not None:
                pushed["url"] = server.url
            found = ranks.run(train_sampling, said, [f"train.steps={STEPS}"], world_size=world)
            assert set(found) == {(False, STEPS)}
            figures = logged(output, ("mismatch", "completion_length", "grad_norm"))
            print(name, figures)
            assert [line["step"] for line in figures] == [1, 2, 3]
            assert 0 < max(line["mismatch"] for line in figures) <= BOUND
            assert all(line["grad_norm"] > 0 for line in figures)
            answers = [json.loads(line) for line in (output / "rollouts" / "step-1.jsonl").read_text().splitlines()]
            assert len({answer["text"] for answer in answers[:4]}) > 1, "answers to one prompt are drawn each by itself"
            ids = prompts(base)
            apart = furthest(ask(server, str(base), ids), expected(exported, ids, 1))
            version = server.get("/weight_info")["weight_version"]
            if pushed is None:
                # The last update was not sent; that it moved the weights says that those before were.
                assert (apart > APART, version) == (True, f"prompt {2 * (STEPS - 1)}")
            else:
                print(f"{name}: {apart:.1e} from the exported folder, after the last step")
                assert (apart <= BOUND, version) == (True, f"step {STEPS}")


class WithoutTransfer(BaseHTTPRequestHandler):
    """A server that has a version, and takes no weights."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"version": "0"}')

    def do_POST(self) -> None:
        self.send_error(503, "starting")


def test_weights_that_are_not_taken(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """`sync.url` of a run that needs no server: it is said, and the run goes on."""
    said = plain(toy("e2b"), tmp_path / "run", steps=3)
    with ThreadingHTTPServer(("127.0.0.1", 0), WithoutTransfer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        said["sync"] = {"url": f"http://127.0.0.1:{server.server_port}", "every": 2}
        (told,) = ranks.run(train_told, said, [], world_size=1)
        server.shutdown()
    found = [line for line in told.said if line.startswith("sync: ")]
    assert told.step == 3 and len(found) == 2, told.said
    for line, step in zip(found, (2, 3), strict=True):
        assert line.startswith(f"sync: the weights of step {step} were not taken: http://127.0.0.1"), line


def test_a_server_that_is_not_there(ranks: RankPool, toy: Toy, tmp_path: Path) -> None:
    """It is said before a step is made, on every rank."""
    said = recipe(toy("e4b"), write_questions(tmp_path / "questions.jsonl", 2), tmp_path / "run")
    said["grpo"] |= {"engine": "vllm", "engine_url": "http://127.0.0.1:9"}
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9: cannot be reached"):
        ranks.run(train_sampling, said, [], world_size=1)
    assert not (tmp_path / "run" / "log.jsonl").exists()
