"""The count of floating-point operations, by hand and against what torch sees transformers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bridge.flops import attention_flops, audio_flops, decoder_flops, head_flops, vision_flops
from bridge.geometry import AudioGeometry, Geometry
from bridge.toy import VARIANTS, write_toy
from bridge.toy.config import published, toy_config
from bridge.verify.reference import load_hf
from recipes.train.workload import training_flops


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Geometry, Any]]:
    made = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp(variant) / "toy"
        write_toy(variant, folder, dtype="float32")
        geometry = Geometry.from_folder(folder)
        made[variant] = geometry, load_hf(Path(folder), geometry, torch.float32).eval()
    return made


def counted(model: Any, **inputs: Any) -> dict[str, int]:
    """What torch counts in a forward pass, by the name of the module."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    return {str(name): sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_text_as_torch_counts_it(toys: dict[str, tuple[Geometry, Any]], variant: str) -> None:
    geometry, model = toys[variant]
    batch, length = 2, 12
    by_module = counted(model, input_ids=torch.randint(8, 100, (batch, length)), use_cache=False)
    # The rotary tables are products in transformers, of positions and frequencies: they are no work of the model's.
    rotary = sum(count for name, count in by_module.items() if name.endswith("rotary_emb"))
    tokens = batch * length
    # Its eager attention multiplies everything with everything.
    attention = sum(attention_flops(layer) for layer in geometry.layers) * batch * length**2
    ours = tokens * (decoder_flops(geometry) + head_flops(geometry)) + attention
    assert ours == by_module["Global"] - rotary


@pytest.mark.parametrize("variant", ["e4b", "12b", "26b-a4b"])
def test_images_as_torch_counts_them(toys: dict[str, tuple[Geometry, Any]], variant: str) -> None:
    geometry, model = toys[variant]
    assert geometry.vision is not None
    side = 2 * geometry.vision.kernel
    grid = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
    pixels = torch.rand(1, side**2, geometry.vision.patch_values)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.get_image_features(pixels, grid)
    theirs = sum(counter.get_flop_counts()["Global"].values())
    if not geometry.unified:
        # transformers pools by a product with a matrix of ones and zeros.
        theirs -= 2 * side**2 * (side // geometry.vision.kernel) ** 2 * geometry.vision.output_size
    assert vision_flops(geometry, [side**2]) == theirs


def test_sounds_as_torch_counts_them(toys: dict[str, tuple[Geometry, Any]]) -> None:
    """Linears and convolutions; attention is another count, since transformers pads it to blocks."""
    geometry, model = toys["e4b"]
    audio, frames = geometry.audio, 96
    assert isinstance(audio, AudioGeometry)
    features, mask = torch.rand(1, frames, audio.features), torch.ones(1, frames, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.get_audio_features(features, mask)
    by_module = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    attention = sum(count for name, count in by_module.items() if name.endswith("self_attn"))
    tokens, size = frames // 4, audio.hidden_size
    pairs = sum(min(place + 1, audio.window) for place in range(tokens))
    ours = audio.num_layers * (8 * size**2 * tokens + 6 * size * pairs + 2 * size**2 * audio.window)
    assert audio_flops(geometry, [frames]) - ours == by_module["Global"] - attention


def test_by_hand() -> None:
    """26B, layer 0 (sliding) and layer 5 (global, K is V), numbers of its published config."""
    geometry = Geometry.from_dict(published("26b-a4b"))
    hidden, heads, experts = 2816, 16, 3 * 8 * 704 + 128
    sliding = 2 * heads * 256 + 2 * 8 * 256 + 3 * 2112 + experts
    full = 2 * heads * 512 + 2 * 512 + 3 * 2112 + experts
    assert decoder_flops(geometry) == 2 * hidden * (25 * sliding + 5 * full)
    assert attention_flops(geometry.layers[0]) == 4 * heads * 256
    assert head_flops(geometry) == 2 * hidden * 262_144
    # About twice the active parameters.
    assert 2 * 3.0e9 < decoder_flops(geometry) + head_flops(geometry) < 2 * 4.2e9


def test_windows_documents_and_labels_by_hand() -> None:
    geometry = Geometry.from_dict(toy_config("31b").written)
    window, lengths, width = 8, (20, 5), 32
    sliding = sum(min(i + 1, window) for length in lengths for i in range(length))
    full = sum(length * (length + 1) // 2 for length in lengths)
    attention = sum(
        attention_flops(layer) * (sliding if layer.kind == "sliding" else full) for layer in geometry.layers
    )
    labels = torch.full((1, width), -100)
    labels[0, :7] = 1
    forward = sum(lengths) * decoder_flops(geometry) + attention + 7 * head_flops(geometry)
    mask = (torch.arange(width) < sum(lengths)).long()[None]
    packed = {
        "input_ids": torch.full((1, width), 9),
        "labels": labels,
        "attention_mask": mask,
        "cu_seqlens": torch.tensor([0, 20, 25, 32]),
    }
    assert training_flops(geometry, [packed, packed]) == 3 * 2 * forward
    # With adapters no gradients of weights are computed, and attention has none.
    assert training_flops(geometry, [packed], adapters=True) == 2 * forward + attention


def test_an_image_block_sees_itself() -> None:
    """A run of 10 image tokens in a row of 12, on the 12B with a window of 8: they see all of it ahead of them in
    sliding layers, none of it in global ones; in those of transformers' `forward` they see each other everywhere."""
    geometry = Geometry.from_dict(toy_config("12b").written)
    row = {"input_ids": torch.full((1, 12), 9), "labels": torch.full((1, 12), -100)}
    types = torch.zeros(1, 12, dtype=torch.int64)
    types[0, 1:11] = 1
    batch = row | {"mm_token_type_ids": types}
    for vision_mask, seen in (
        ("generate", (12 * 13 // 2, 1 + 7 * 11 + 10 + 9 + 8 + 8)),
        ("forward", (1 + 10 * 11 + 12, 1 + 10 * 10 + 7 + 8)),
    ):
        assert training_flops(geometry, [batch], vision_mask=vision_mask) == 3 * (
            12 * decoder_flops(geometry)
            + sum(attention_flops(layer) * seen[layer.kind == "sliding"] for layer in geometry.layers)
        )
