"""One measurement, by its name. To know of it takes no torch: whoever starts processes begins at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.random_model import RandomModel

# Short rows go through in turn until there are so many tokens, so that one update serves as many of them everywhere.
TOKENS_A_STEP = 16_384
# What is kept for the backward pass, fullest first.
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Case:
    """One measurement. `side`: ours, transformers or liger; `size` as of `RandomModel`.

    `mode`: sft, lora, or loss: there the side says whether the head takes a gradient. `recompute`: of ours; auto: as
    little as fits. `kernels`: of ours; torch: without this project's own. `attention`: of ours, of global layers.
    """

    variant: str
    mode: str
    length: int
    side: str = "ours"
    media: bool = False
    layer_spec: str = "local"
    fp8: str = "none"
    fp8_experts: bool = False
    recompute: str = "auto"
    kernels: str = "auto"
    attention: str = "auto"
    size: str = "published"
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """`lora/12b/8192/ours`."""
        usual = ("local", "none", "auto")
        fp8_experts = "fp8 experts" if self.fp8_experts else "none"
        options = (self.layer_spec, self.fp8, fp8_experts, self.recompute, self.kernels, self.attention)
        side = "+".join([self.side, *(x for x in options if x not in usual)])
        return "/".join([self.mode, self.variant + ("+media" if self.media else ""), str(self.length), side])

    @property
    def microbatches(self) -> int:
        return max(1, TOKENS_A_STEP // self.length) if self.size == "published" else 1

    @property
    def model(self) -> RandomModel:
        import torch

        from benchmarks.random_model import RandomModel

        return RandomModel(self.variant, getattr(torch, self.dtype), self.size, text_only=not self.media)

    @property
    def lora(self) -> bool:
        return self.mode == "lora"

    def batches(self) -> Iterator[dict[str, Tensor]]:
        from benchmarks.random_model import random_batches

        return random_batches(self.model.geometry, self.length, self.media)

    def flops(self) -> float:
        """That a step has to do, whoever does it."""
        from bridge.mapping.modalities import MODALITIES
        from recipes.train.workload import training_flops

        batches = list(islice(self.batches(), self.microbatches))
        return training_flops(self.model.geometry, batches, MODALITIES if self.lora else (), self.lora)


def available(case: Case) -> str | None:
    """Why a case cannot be run here, or None."""
    needed = {"liger": "liger_kernel"}.get(case.side) or ("transformer_engine" if case.layer_spec == "te" else None)
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed"
    return None
