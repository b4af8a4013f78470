"""The activation of every Gemma 4 FFN: gelu_pytorch_tanh of the gate, times up."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from bridge.megatron.config import Gemma4TransformerConfig, gelu_tanh
from bridge.megatron.kernels import fused


def geglu(x: Tensor, kernels: str) -> Tensor:
    """`x` [..., 2 n], gate and up side by side -> [..., n]. The activation has the dtype of `x`, as in transformers."""
    if fused(kernels, x):
        from bridge.megatron.kernels import geglu as triton

        return triton.geglu(x)
    gate, up = x.chunk(2, dim=-1)
    return gelu_tanh(gate) * up


def gated_gelu(gate: Tensor, up: Tensor, kernels: str) -> Tensor:
    """`gate` and `up` [..., n], one dtype -> [..., n]."""
    if fused(kernels, gate):
        from bridge.megatron.kernels import geglu as triton

        return triton.gated_gelu(gate, up)
    return gelu_tanh(gate) * up


class Gemma4MLP(MLP):
    """Megatron's MLP; it takes a fused activation only for functions that it knows."""

    config: Gemma4TransformerConfig

    def forward(self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """[s (/tp), b, h] -> the same, and no bias."""
        assert per_token_scale is None
        x, _none = self.linear_fc1(hidden_states)
        output, _none = self.linear_fc2(geglu(x, self.config.kernels))
        return output, None
