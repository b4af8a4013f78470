"""Adapters of what sees, in vLLM's server: with its flag a picture is seen as by the merged folder, else as before."""

from __future__ import annotations

import base64
import io
import random
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge.geometry import Geometry
from bridge.lora.merge import merge_adapter
from bridge.lora.peft_folder import write_peft
from bridge.lora.source import open_both, open_with_table
from bridge.verify.media import drawing, load_processor
from bridge.verify.reference import load_hf
from tests.engines.kit import HEAD_DIM, Answer, EngineFailed, answered, furthest, placeholders
from tests.engines.openai_kit import asking, chat, vllm_server
from tests.functional.adapter_kit import make_adapter
from tests.functional.conftest import Toy

pytestmark = pytest.mark.engine

BOUND, APART, TOKENS = 1e-4, 0.1, 8
TARGETS = {
    "e4b": r".*(vision_tower\..*_proj\.linear|embed_vision\.embedding_projection)",
    "12b": r".*embed_vision\.(patch_dense|multimodal_embedder\.embedding_projection)",
}
FLAGS = ("--enable-lora", "--max-lora-rank", "8", "--max-model-len", "512")
TOWERS = "--enable-tower-connector-lora"


@dataclass(frozen=True)
class Seen:
    """A question about a picture, as the server takes it and as its tokens, and what transformers answers to it."""

    messages: list[Any]
    ids: list[int]
    merged: Answer
    plain: Answer


def seen(base: Path, variant: str, workdir: Path) -> Seen:
    """`workdir` has the adapter in `vllm` afterwards. On a CPU vLLM's masks are causal: transformers' are made so."""
    make_adapter(base, workdir / "peft", target_modules=TARGETS[variant])
    with ExitStack() as stack:
        write_peft(workdir / "vllm", open_with_table(stack, workdir / "peft", None), adapter_format="vllm")
        merge_adapter(*open_both(stack, workdir / "peft", None), workdir / "merged")
    picture, file = drawing(90, 60, random.Random(0)), io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    text = {"type": "text", "text": "What is it?"}
    ours = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}]
    theirs = [{"role": "user", "content": [{"type": "image", "image": picture}, text]}]
    inputs = load_processor(base).apply_chat_template(
        theirs, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    if Geometry.from_folder(base).bidirectional_vision:
        inputs["mm_token_type_ids"].zero_()

    def of(folder: Path) -> Answer:
        model = load_hf(folder, Geometry.from_folder(folder), torch.float32).eval()
        return answered(model, inputs, TOKENS, placeholders(base))

    return Seen(ours, inputs["input_ids"][0].tolist(), of(workdir / "merged"), of(base))


@pytest.mark.parametrize(
    ("variant", "flags", "taken"), [("e4b", (TOWERS,), True), ("e4b", (), False), ("12b", (), False)]
)
def test_a_picture(variant: str, flags: tuple[str, ...], taken: bool, toy: Toy, tmp_path: Path) -> None:
    base = toy(variant, head_dim=HEAD_DIM)
    asked = seen(base, variant, tmp_path)
    assert furthest([asked.merged], [asked.plain]) > APART
    named = ("--lora-modules", f"vision={tmp_path / 'vllm'}")
    with vllm_server(base, tmp_path / "said.log", *FLAGS, *flags, *named, media={"image": 1}) as server:
        for name, wanted in (("vision", asked.merged if taken else asked.plain), ("base", asked.plain)):
            ids, answer, _ = chat(server, name, asked.messages, **asking(placeholders(base), TOKENS))
            assert ids == asked.ids
            print(f"{variant} {name}: {furthest([answer], [wanted]):.1e} from transformers")
            assert furthest([answer], [wanted]) <= BOUND
            assert answer.tokens == wanted.tokens


def test_an_embedder_has_no_flag(toy: Toy, tmp_path: Path) -> None:
    """12B has no tower, and vLLM's flag asks for the size of one."""
    base = toy("12b", head_dim=HEAD_DIM)
    said = tmp_path / "said.log"
    with pytest.raises(EngineFailed), vllm_server(base, said, *FLAGS, TOWERS, media={"image": 1}):
        pass
    assert "'Gemma4UnifiedVisionConfig' object has no attribute 'default_output_length'" in said.read_text()
