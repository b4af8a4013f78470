"""Adapters of toys, as PEFT itself makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from bridge.geometry import Geometry

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def load_model(folder: Path) -> Any:
    """The transformers model of a folder, in float32."""
    kind = getattr(transformers, Geometry.from_folder(folder).architecture)
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def make_adapter(folder: Path, target: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Save an adapter of the model in `folder` with random A and B; returns the PEFT model."""
    options = {"r": 4, "lora_alpha": 6, **options}
    model = peft.get_peft_model(load_model(folder), peft.LoraConfig(**options), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    if dtype != torch.float32:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(target)
    return model
