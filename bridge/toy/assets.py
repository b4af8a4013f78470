"""The files beside a toy's weights: config, generation config, tokenizer, chat template, processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.toy.config import SMALLEST_BUDGET, ToyConfig, image_budget
from bridge.toy.tokenizer import EOS_IDS, build_tokenizer

# How many tokens a toy's drafter drafts at once; transformers reads it from a drafter's generation_config.json.
_DRAFT_TOKENS = 4


def write_assets(folder: Path, toy: ToyConfig, *, full_size: bool) -> None:
    """Write everything but weights and config.json."""
    from transformers import GenerationConfig

    multimodal = toy.multimodal
    drafting = {} if toy.drafter is None else {"num_assistant_tokens": _DRAFT_TOKENS}

    build_tokenizer(multimodal).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=2,
        eos_token_id=list(EOS_IDS),
        pad_token_id=0,
        do_sample=True,
        temperature=1.0,
        top_k=64,
        top_p=0.95,
        **drafting,
    ).save_pretrained(folder)
    if not toy.text_only and toy.drafter is None:
        path = folder / "processor_config.json"
        text = json.dumps(processor_config(multimodal, full_size=full_size), indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")


def processor_config(config: Mapping[str, Any], *, full_size: bool = False) -> dict[str, Any]:
    """`processor_config.json` of a multimodal config: patch size, pooling and audio features as the model has them.

    It is written by hand because transformers can only build the video processor where torchvision is installed. A
    model without audio has a feature extractor as well: the processor class asks for one.
    """
    family = "Gemma4Unified" if config["model_type"] == "gemma4_unified" else "Gemma4"
    vision, audio = config["vision_config"], config["audio_config"]
    budget = image_budget(config)
    pixels = {
        "do_convert_rgb": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "patch_size": vision["patch_size"],
        "pooling_kernel_size": vision["pooling_kernel_size"],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    return {
        "audio_ms_per_token": 40,
        "audio_seq_length": 750,
        "feature_extractor": _feature_extractor(family, audio),
        "image_processor": pixels
        | {
            "do_normalize": False,
            "image_processor_type": f"{family}ImageProcessor",
            "image_seq_length": budget,
            "max_soft_tokens": budget,
        },
        "image_seq_length": budget,
        "processor_class": f"{family}Processor",
        "video_processor": pixels
        | {
            "do_normalize": True,
            "do_sample_frames": True,
            "max_soft_tokens": SMALLEST_BUDGET,
            "num_frames": 32 if full_size else 4,
            "return_metadata": False,
            "video_processor_type": f"{family}VideoProcessor",
        },
    }


def _feature_extractor(family: str, audio: Mapping[str, Any] | None) -> dict[str, Any]:
    common = {
        "feature_extractor_type": f"{family}AudioFeatureExtractor",
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 16_000,
    }
    if family == "Gemma4Unified":
        samples = audio["audio_embed_dim"] if audio else 640
        return common | {"audio_samples_per_token": samples, "feature_size": samples}
    # A tower's projection is only as wide as its features where the mel bins equal its first channels.
    bins = audio["subsampling_conv_channels"][0] if audio else 128
    return common | {
        "dither": 0.0,
        "feature_size": bins,
        "fft_overdrive": False,
        "frame_length_ms": 20.0,
        "hop_length_ms": 10.0,
        "input_scale_factor": 1.0,
        "max_frequency": 8000.0,
        "mel_floor": 0.001,
        "min_frequency": 0.0,
        "preemphasis": 0.0,
        "preemphasis_htk_flavor": True,
    }
