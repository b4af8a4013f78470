"""Processors of toys: what they make of images, video and audio is what the models take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bridge.toy import VARIANTS
from bridge.toy.assets import processor_config
from bridge.toy.config import toy_config

from .toy_kit import Toys, config_of, load, toys_in

AUDIO = ("e2b", "e4b", "12b")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    return toys_in(tmp_path_factory.mktemp("toys"))


def drawing(width: int, height: int) -> Any:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 8, width // 2, height // 2), fill="red")
    draw.line((0, height, width, 0), fill="blue", width=3)
    return image


def tone(samples: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / 16_000)).astype(np.float32)


def requests(variant: str) -> dict[str, dict[str, Any]]:
    clip = np.stack([np.array(drawing(90, 60))[:, :: 1 if frame % 2 else -1] for frame in range(6)])
    metadata = {"total_num_frames": 6, "fps": 2.0, "frames_indices": list(range(6)), "duration": 3.0}
    made: dict[str, dict[str, Any]] = {
        "image": {"text": ["see <|image|> now"], "images": [[drawing(90, 60)]]},
        "two images": {"text": ["<|image|> or <|image|>"], "images": [[drawing(90, 60), drawing(40, 130)]]},
        "video": {"text": ["see <|video|> now"], "videos": [clip], "video_metadata": [metadata]},
    }
    if variant in AUDIO:
        made["audio"] = {"text": ["hear <|audio|> now"], "audio": [tone(16_001)]}
        made["all"] = {
            "text": ["hear <|audio|> see <|image|> now"],
            "audio": [tone(9_000)],
            "images": [[drawing(60, 60)]],
        }
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_processor_and_model_fit(variant: str, toys: Any) -> None:
    pytest.importorskip("torchvision", reason="transformers' Gemma 4 processors need torchvision")
    folder = toys(variant)
    processor, model = transformers.AutoProcessor.from_pretrained(folder), load(folder)
    config = config_of(folder)
    for name, request in requests(variant).items():
        inputs = processor(**request, return_tensors="pt")
        kinds = {"image": 1, "two images": 1, "video": 2, "audio": 3, "all": 3}
        assert (inputs["mm_token_type_ids"] == kinds[name]).any(), name
        if name == "audio":
            assert (inputs["input_ids"] == config["audio_token_id"]).sum() == (26 if variant == "12b" else 25)
        with torch.no_grad():
            assert torch.isfinite(model(**inputs).logits).all(), name


def patches(config: dict[str, Any], rows: int, columns: int, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and positions of an image of rows x columns soft tokens, padded to a budget as a processor would."""
    vision = config["vision_config"]
    pool = 1 if config["model_type"] == "gemma4_unified" else vision["pooling_kernel_size"]
    side = vision["patch_size"] * (vision["pooling_kernel_size"] if pool == 1 else 1)
    height, width, length = rows * pool, columns * pool, budget * pool**2
    pixels = torch.zeros(1, length, 3 * side**2)
    pixels[:, : height * width] = torch.rand(height * width, 3 * side**2, generator=torch.Generator().manual_seed(0))
    positions = torch.full((1, length, 2), -1)
    grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), dim=-1)
    positions[0, : height * width] = grid.reshape(-1, 2)
    return pixels, positions


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_modality_reaches_the_logits(variant: str, toys: Any) -> None:
    """Without a processor: the towers run, and the last token sees what they were given."""
    folder = toys(variant)
    config, model = config_of(folder), load(folder)

    def last(ids: list[int], kind: int, features: dict[str, Any]) -> torch.Tensor:
        tokens = torch.tensor([[2, 300, *ids, 301, 302]])
        types = torch.tensor([[0, 0, *([kind] * len(ids)), 0, 0]])
        with torch.no_grad():
            logits = model(input_ids=tokens, mm_token_type_ids=types, **features).logits
        assert torch.isfinite(logits).all()
        return logits[0, -1]

    def turned(features: dict[str, Any]) -> dict[str, Any]:
        """The same with every patch or frame back to front; the 12B's front does not see a mere change of scale."""
        return {name: value.flip(-1) if value.is_floating_point() else value for name, value in features.items()}

    pixels, positions = patches(config, 3, 5, 20)
    given = [
        ("image_token_id", 15, 1, {"pixel_values": pixels, "image_position_ids": positions}),
        (
            "video_token_id",
            15,
            2,
            {
                "pixel_values_videos": pixels,
                "video_position_ids": positions,
                "num_frames_per_video": torch.tensor([1]),
            },
        ),
    ]
    if variant in AUDIO:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        heard = extractor([tone(16_001)], return_tensors="pt")
        given.append(("audio_token_id", 26 if variant == "12b" else 25, 3, dict(heard)))
    for field, count, kind, features in given:
        ids = [config[field]] * count
        assert (last(ids, kind, features) - last(ids, kind, turned(features))).abs().max() > 1e-3, field


@pytest.mark.parametrize("variant", VARIANTS)
def test_processor_files_name_classes_and_sizes(variant: str) -> None:
    config = toy_config(variant).multimodal
    files = processor_config(config)
    family = "Gemma4Unified" if variant == "12b" else "Gemma4"
    assert files["processor_class"] == f"{family}Processor"
    # What engines read, in the config, and transformers' processor, in its own file.
    said = "num_soft_tokens" if variant == "12b" else "default_output_length"
    assert config["vision_config"][said] == files["image_processor"]["max_soft_tokens"]
    for part in ("image_processor", "video_processor"):
        assert files[part]["patch_size"] == config["vision_config"]["patch_size"]
        assert files[part]["pooling_kernel_size"] == config["vision_config"]["pooling_kernel_size"]
        budget = files[part]["max_soft_tokens"]
        sides = config["vision_config"].get("position_embedding_size", config["vision_config"].get("mm_posemb_size"))
        assert sides >= budget * (1 if variant == "12b" else config["vision_config"]["pooling_kernel_size"])
    if variant in ("e2b", "e4b"):
        bins = config["audio_config"]["subsampling_conv_channels"][0]
        assert files["feature_extractor"]["feature_size"] == bins
