"""The values that adapters begin with."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from bridge.lora.spec import Factor, Target
from bridge.lora.table import Values


def initial_values(seed: int) -> Values:
    """PEFT's: A uniform as torch's linears are (kaiming, a = sqrt 5: within ± in^-0.5), B zero.

    Of an embedding A is zero and B normal. Magnitudes are those of the base, which is not known here: zeros, until
    `inject.start_magnitudes`. A tensor depends on the seed and its name alone: it is the same in every layout.
    """

    def value(target: Target, part: Factor) -> Tensor:
        if part != ("B" if target.kind == "embedding" else "A"):
            return torch.zeros(target.shape_of(part))
        digest = hashlib.sha256(f"{seed} {target.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if part == "B":
            return torch.randn(target.shape_b, generator=generator)
        bound = 1 / math.sqrt(target.shape_a[-1])
        return torch.empty(target.shape_a).uniform_(-bound, bound, generator=generator)

    return value
