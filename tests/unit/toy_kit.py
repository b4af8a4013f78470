"""Toys for the tests, and transformers' models of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from bridge.toy import write_toy


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    """The model in the class that its config names; nothing may be missing or left over."""
    model_class = getattr(transformers, config_of(folder)["architectures"][0])
    model, info = model_class.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


Toys = Callable[..., Path]


def toys_in(root: Path) -> Toys:
    """`toys(variant, **options)`: the folder of a toy, written once."""
    folders: dict[str, Path] = {}

    def get(variant: str, **options: Any) -> Path:
        key = "-".join([variant, *(f"{name}={value}" for name, value in sorted(options.items()))])
        if key not in folders:
            folders[key] = root / key
            write_toy(variant, folders[key], **options)
        return folders[key]

    return get
