"""Transformer Engine's linears in the places of Megatron's, with the same parameters, keys and adapters.

FP8 is switched on here, around each product: what is between linears never sees it, and a recomputed layer enters it
again by itself. Current and block scaling read their scales off the tensors at hand, and weights are rounded for each
product (see `parts.py`), so that no state outlives it.

Written against Megatron-Core 0.19.2 and the interface of Transformer Engine 2.20, with which it has not been run.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from bridge.megatron.linear import adapted


class QuantizableLinear(torch.nn.Module):
    """What comes before a linear of Megatron's among the bases of a class: FP8 as the config says, and an adapter.

    There is no `_extra_state` to keep, and checkpoints of local linears have none: as in Megatron's own linears the
    entry is there and empty, and its absence is no error.
    """

    config: Any
    bias: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = torch.nn.ModuleDict()
        self.register_load_state_dict_pre_hook(_allow_no_extra_state)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in] -> [s, b, out] and no bias, as Megatron's linears."""
        with get_fp8_context(self.config):
            output, bias = super().forward(x)
        # Without a bias Transformer Engine keeps an empty tensor.
        used_bias = self.bias if self.bias is not None and self.bias.numel() else None
        return adapted(self, x, output, used_bias), bias

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, state: Any) -> None: ...


def _allow_no_extra_state(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.setdefault(f"{prefix}_extra_state", None)


def quantizable(column: type[torch.nn.Module], row: type[torch.nn.Module]) -> tuple[type, type]:
    """Classes of a column-parallel and of a row-parallel linear, made of Megatron's."""
    return (
        type("TEColumnLinear", (QuantizableLinear, column), {"split": "column", "__module__": __name__}),
        type("TERowLinear", (QuantizableLinear, row), {"split": "row", "__module__": __name__}),
    )


def te_linears() -> tuple[type, type]:
    """Those of Transformer Engine. Only where the package is: without it Megatron's classes are empty shells."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return quantizable(TEColumnParallelLinear, TERowParallelLinear)
