"""docs/engines.md, «From a run to a served model in five commands»: the commands, as they stand there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.geometry import Geometry
from bridge.toy import write_toy
from bridge.verify.media import load_processor
from bridge.verify.reference import load_hf
from tests.engines.kit import ENGINES, HEAD_DIM, ROOT, SECONDS, answered, reserved_port
from tests.engines.openai_kit import FLAGS, SERVER_ENVIRONMENT

pytestmark = pytest.mark.engine

_BLOCK = re.compile(
    r"^<!-- run by tests/engines/test_five_commands.py -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
PAIRS = [{"prompt": f"What comes after {number}?", "completion": str(number + 1)} for number in range(1, 5)]


def commands() -> str:
    (block,) = _BLOCK.findall((ROOT / "docs" / "engines.md").read_text(encoding="utf-8"))
    return str(block)


def command_vllm(folder: Path) -> Path:
    """`vllm serve MODEL …`, with what a CPU needs: the command of the package for CPUs ends with an error."""
    folder.mkdir()
    script = folder / "vllm"
    python = f"exec {ENGINES / 'bin' / 'python'} -m vllm.entrypoints.openai.api_server"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = serve ] && shift\n{python} --model "$@" {" ".join(FLAGS)} --max-model-len 256\n'
    )
    script.chmod(0o755)
    return folder


def answer_of(folder: Path, question: str) -> str:
    """What transformers answers, greedily, to the end of the turn."""
    processor = load_processor(folder)
    messages = [{"role": "user", "content": question}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    model: Any = load_hf(folder, Geometry.from_folder(folder), torch.float32).eval()
    tokens = answered(model, inputs, 16, []).tokens
    ends = [place for place, token in enumerate(tokens) if token in (1, 106, 50)]
    return str(processor.tokenizer.decode(tokens[: min(ends, default=len(tokens))], skip_special_tokens=True))


def test_they_serve_what_was_trained(tmp_path: Path) -> None:
    """The adapter answers in the server what the merged folder answers in transformers, and not what the base does."""
    write_toy("e4b", tmp_path / "model", dtype="float32", head_dim=HEAD_DIM)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    assert len([line for line in commands().splitlines() if line and not line.startswith((" ", "#"))]) == 5
    path = f"{command_vllm(tmp_path / 'bin')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | SERVER_ENVIRONMENT | {"PATH": path, "PYTHONPATH": str(ROOT)}
    answer = tmp_path / "answer.json"
    with reserved_port() as port, (tmp_path / "said.log").open("w") as log, answer.open("w") as out:
        script = commands().replace("8000", str(port))
        process = subprocess.Popen(
            ["bash", "-eu", "-c", script],
            cwd=tmp_path,
            env=environment,
            stdout=out,
            stderr=log,
            start_new_session=True,
        )
        try:
            status = process.wait(SECONDS)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
    assert status == 0, (tmp_path / "said.log").read_text()[-4000:]
    (line,) = [line for line in answer.read_text().splitlines() if line.startswith('{"id"')]
    said = json.loads(line)["choices"][0]["message"]["content"]
    question = json.loads(re.findall(r"-d '(.*)'", script)[0])["messages"][0]["content"]
    assert said == answer_of(tmp_path / "merged", question) != answer_of(tmp_path / "model", question)
