"""vLLM's OpenAI-compatible server on an exported folder: chats, tools, pictures, sound, adapters that come and go."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
import wave
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bridge.geometry import Geometry
from bridge.geometry.towers import UnifiedAudioGeometry
from bridge.lora.merge import merge_adapter
from bridge.lora.peft_folder import write_peft
from bridge.lora.source import open_both, open_megatron, open_with_table
from bridge.ranks import RankPool
from bridge.verify.media import SAMPLING_RATE, clip, drawing, load_processor, tone
from bridge.verify.reference import load_hf
from tests.engines.kit import (
    ANSWER,
    HEAD_DIM,
    Answer,
    EngineFailed,
    Server,
    answered,
    expected,
    furthest,
    placeholders,
    prompts,
)
from tests.engines.openai_kit import asking, chat, complete, vllm_server
from tests.functional.adapter_kit import make_adapter, save_run
from tests.functional.conftest import Toy
from tests.functional.generation_kit import run_recipe
from tests.functional.test_lora_training import TEXT

pytestmark = pytest.mark.engine

BOUND, APART = 1e-4, 0.1
ADAPTERS = ("run", "peft")
# Room is made for the longest clip that may come.
MEDIA = {"image": 1, "audio": 1, "video": {"count": 1, "num_frames": 3}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION, CALL = "What is the weather in Rome?", {"name": "weather", "arguments": {"city": "Rome"}}
CHATS = [
    {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        ],
        "tools": [TOOL],
    },
    {"messages": [{"role": "user", "content": "What comes after 1?"}, {"role": "assistant", "content": "2"}]},
]


# The toys' template writes the arguments of a call as JSON, published ones in a way of their own, which parsers expect.
AS_JSON, AS_PUBLISHED = (
    "(call.function.arguments | tojson)",
    """'{city:<|"|>' + call.function.arguments.city + '<|"|>}'""",
)


@dataclass(frozen=True)
class Served:
    """A server, the folder that it has, and where adapters of it and what they are merged into lie."""

    server: Server
    folder: Path
    workdir: Path

    @property
    def never(self) -> list[int]:
        return placeholders(self.folder)

    def ask(self, model: str) -> list[Answer]:
        return [complete(self.server, model, ids, self.never) for ids in prompts(self.folder)]


@pytest.fixture(scope="module", params=["e2b", "e4b", "12b"])
def served(
    request: pytest.FixtureRequest, ranks: RankPool, toy: Toy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    workdir = tmp_path_factory.mktemp(request.param)
    data, base, folder = workdir / "chats.jsonl", workdir / "base", workdir / "trained"
    shutil.copytree(toy(request.param, head_dim=HEAD_DIM), base)
    template = (base / "chat_template.jinja").read_text()
    assert AS_JSON in template
    (base / "chat_template.jinja").write_text(template.replace(AS_JSON, AS_PUBLISHED))
    data.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    said = {
        "output": str(workdir / "training"),
        "model": {"hf": str(base), "dtype": "float32"},
        "data": {"path": str(data), "cache": str(workdir / "cache")},
        "train": {"steps": 60, "global_batch_size": 2, "micro_batch_size": 2, "seq_length": 512},
        "optimizer": {"lr": 4e-3},
        "export": {"hf": str(folder)},
    }
    ranks.run(run_recipe, said, [], world_size=1)
    ranks.run(save_run, folder, workdir / "run", {}, {"targets": TEXT, "parameters": []}, world_size=1)
    make_adapter(folder, workdir / "peft", target_modules=TEXT)
    with ExitStack() as stack:
        write_peft(workdir / "run-vllm", open_megatron(stack, workdir / "run"), adapter_format="vllm")
        write_peft(workdir / "peft-vllm", open_with_table(stack, workdir / "peft", None), adapter_format="vllm")
        for name in ADAPTERS:
            model, adapter = open_both(stack, workdir / name, None)
            merge_adapter(model, adapter, workdir / f"{name}-merged")
    lora = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", "8")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "gemma4", "--max-model-len", "512")
    with vllm_server(folder, workdir / "said.log", *lora, *tools, media=MEDIA) as server:
        yield Served(server, folder, workdir)


def agree(served: list[Answer], theirs: list[Answer]) -> None:
    difference = furthest(served, theirs)
    print(f"{difference:.1e} from transformers")
    assert difference <= BOUND
    assert [answer.tokens for answer in served] == [answer.tokens for answer in theirs]


def test_completions(served: Served) -> None:
    agree(served.ask("base"), expected(served.folder, prompts(served.folder)))


def chat_agrees(served: Served, ours: list[Any], theirs: list[Any], max_tokens: int = 8, **videos: Any) -> None:
    """A conversation as the server takes it and as transformers does: the same tokens, and the same answer.

    There are no blocks of image tokens in vLLM's attention on a CPU; E2B and E4B have none.
    """
    ids, answer, _ = chat(served.server, "base", ours, **asking(served.never, max_tokens))
    processor = load_processor(served.folder)
    if videos:
        text = processor.apply_chat_template(theirs, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=[text], return_tensors="pt", add_special_tokens=False, **videos)
    else:
        inputs = processor.apply_chat_template(
            theirs, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    assert ids == inputs["input_ids"][0].tolist()
    geometry = Geometry.from_folder(served.folder)
    if geometry.bidirectional_vision:
        inputs["mm_token_type_ids"].zero_()
    model = load_hf(served.folder, geometry, torch.float32).eval()
    agree([answer], [answered(model, inputs, max_tokens, served.never)])


def test_a_picture(served: Served) -> None:
    picture, file = drawing(90, 60, random.Random(0)), io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    text = {"type": "text", "text": "What is it?"}
    ours = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}]
    chat_agrees(served, ours, [{"role": "user", "content": [{"type": "image", "image": picture}, text]}])


def test_a_video(served: Served) -> None:
    """Frames as JPEGs, one a second: of a file the server would choose them, by its own reader."""
    files = []
    for frame in clip(3, random.Random(0)):
        Image.fromarray(frame).save(file := io.BytesIO(), "JPEG")
        files.append(file)
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(file.getvalue()).decode() for file in files)
    text = {"type": "text", "text": "What happens?"}
    ours = [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": url}}, text]}]
    chat_agrees(
        served,
        ours,
        [{"role": "user", "content": [{"type": "video"}, text]}],
        videos=[np.stack([np.asarray(Image.open(file)) for file in files])],
        video_metadata=[{"total_num_frames": 3, "fps": 1.0, "frames_indices": [0, 1, 2], "duration": 3.0}],
        do_sample_frames=False,
    )


def test_a_chat_with_tools(served: Served) -> None:
    """The model's own template on both sides; what it was taught to call is what the server's parser gives."""
    messages = [{"role": "user", "content": QUESTION}]
    ids, answer, message = chat(
        served.server, "base", messages, tools=[TOOL], **asking(served.never, ANSWER, to_the_end=False)
    )
    processor = load_processor(served.folder)
    inputs = processor.apply_chat_template(
        messages, tools=[TOOL], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert ids == inputs["input_ids"][0].tolist()
    model = load_hf(served.folder, Geometry.from_folder(served.folder), torch.float32).eval()
    agree([answer], [answered(model, inputs, len(answer.tokens), served.never)])
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == CALL["name"]
    assert json.loads(call["function"]["arguments"]) == CALL["arguments"]


def test_adapters_come_and_go(served: Served) -> None:
    """Two at once, each as what it is merged into; the other and the base stay what they are when one has gone."""
    server, ids = served.server, prompts(served.folder)
    models = {name: expected(served.workdir / f"{name}-merged", ids) for name in ADAPTERS}
    of_base = expected(served.folder, ids)
    for one, other in ((of_base, models["run"]), (of_base, models["peft"]), (models["run"], models["peft"])):
        assert furthest(one, other) > APART
    for name in ADAPTERS:
        with pytest.raises(EngineFailed, match="does not exist"):
            served.ask(name)
        server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(served.workdir / f"{name}-vllm")})
    with ThreadPoolExecutor(len(ADAPTERS)) as threads:
        for name, answers in zip(ADAPTERS, threads.map(served.ask, ADAPTERS), strict=True):
            agree(answers, models[name])
    agree(served.ask("base"), of_base)
    server.post("/v1/unload_lora_adapter", {"lora_name": "run"})
    with pytest.raises(EngineFailed, match="does not exist"):
        served.ask("run")
    agree(served.ask("peft"), models["peft"])
    server.post("/v1/unload_lora_adapter", {"lora_name": "peft"})
    agree(served.ask("base"), of_base)


def test_sound(served: Served) -> None:
    """The last one: a kernel of vLLM's for a CPU refuses what comes to it in the audio tower of E2B and E4B.

    That ends the server.
    """
    samples = (tone(14_321, random.Random(0)) * 32767).astype("<i2")
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, SAMPLING_RATE, len(samples), "NONE", ""))
        written.writeframes(samples.tobytes())
    data = base64.b64encode(file.getvalue()).decode()
    text = {"type": "text", "text": "What do you hear?"}
    ours = [
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}, text]}
    ]
    heard = {"type": "audio", "audio": samples.astype(np.float32) / 32768}
    if isinstance(Geometry.from_folder(served.folder).audio, UnifiedAudioGeometry):
        chat_agrees(served, ours, [{"role": "user", "content": [heard, text]}])
        return
    with pytest.raises(EngineFailed, match="EngineCore encountered an issue"):
        chat(served.server, "base", ours, **asking(served.never))
    assert "Expected a.stride(-1) == 1 to be true" in (served.workdir / "said.log").read_text()
