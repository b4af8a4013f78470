"""The names of a stage's parameters in the whole model, as recipes mean them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

_LAYER = re.compile(r"^decoder\.layers\.(\d+)(?=\.)")


def named_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """As of `chunk`, in DDP or not; but a layer has its number in the model, and not the one in its stage."""
    model: Any = getattr(chunk, "module", chunk)

    def number(found: re.Match[str]) -> str:
        return f"decoder.layers.{model.decoder.layers[int(found[1])].layer_number - 1}"

    for name, parameter in model.named_parameters():
        yield _LAYER.sub(number, name), parameter
