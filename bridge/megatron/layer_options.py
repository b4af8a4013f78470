"""What a decoder layer is made of: the layer specs by name.

A spec names the classes of a layer's linears. Attention itself, the router, norms, experts and the head are the same in
all: in the dtype of the model, but for experts that are asked to multiply in FP8, in either spec. Both specs have the
same parameters under the same keys, so that a checkpoint is of neither.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from bridge.errors import UsageError

if TYPE_CHECKING:
    import torch

    from bridge.geometry import Geometry
    from bridge.megatron.parallel import Parallel

# Who may compute attention, as `attention_backends` names them, for those who do not import torch.
ATTENTION = ("auto", "reference", "dense", "banded", "blockwise", "sdpa", "flex", "flex_triton", "ffpa")
LOCAL, TE = "local", "te"
NAMES = (LOCAL, TE)
# Weights are rounded for each product. Megatron would keep the rounded copies, two bytes a weight, and make them anew
# in the first microbatch of its schedules only: a model called otherwise, after an update or a live load, would
# multiply by the weights that it had before.
_NO_CACHE = {"disable_parameter_transpose_cache": True}
# What FP8 is called here -> the fields of Megatron's TransformerConfig. Gradients need the range of E5M2 where one
# scale serves a whole tensor ("hybrid"); with one for each block E4M3 serves them too.
FP8: dict[str, dict[str, str | bool]] = {
    "none": {},
    "current": {"fp8": "hybrid", "fp8_recipe": "tensorwise", **_NO_CACHE},
    "block": {"fp8": "e4m3", "fp8_recipe": "blockwise", **_NO_CACHE},
}
# What sizes are multiples of where FP8 is used: tokens of a rank for te's linears, whose products want multiples of 8
# in one direction and of 16 in the other, and the backward pass turns them round; widths for experts.
FP8_MULTIPLE = 16


@dataclass(frozen=True)
class LayerLinears:
    """The linears of a layer: q/k/v and the FFN's first are `column`, the output projection and its second `row`."""

    column: type[torch.nn.Module]
    row: type[torch.nn.Module]


@cache
def layer_linears(name: str, fake_quant: str = "none") -> LayerLinears:
    """The parts of a spec that `check_layer_spec`, and `fake_quant_schemes.check_fake_quant`, allow."""
    if fake_quant != "none":
        from bridge.megatron.fake_quant import FakeQuantColumnLinear, FakeQuantRowLinear

        return LayerLinears(FakeQuantColumnLinear, FakeQuantRowLinear)
    if name == TE:
        from bridge.megatron.te_linear import te_linears

        return LayerLinears(*te_linears())
    from bridge.megatron.linear import ColumnLinear, RowLinear

    return LayerLinears(ColumnLinear, RowLinear)


def check_names(name: str, fp8: str) -> None:
    """What can be said anywhere, a login node too. Raises UsageError for what is not known, or does not go together."""
    if name not in NAMES:
        raise UsageError(f"layer_spec={name}: is one of {', '.join(NAMES)}")
    if fp8 not in FP8:
        raise UsageError(f"fp8={fp8}: is one of {', '.join(FP8)}")
    if fp8 != "none" and name != TE:
        raise UsageError(f"fp8={fp8} needs layer_spec={TE}: the local linears multiply in the dtype of the model")


def check_layer_spec(name: str, fp8: str, dtype: torch.dtype) -> None:
    """`check_names`, and that it can run here. Raises UsageError."""
    import torch

    check_names(name, fp8)
    if name != TE:
        return
    if importlib.util.find_spec("transformer_engine") is None:
        raise UsageError(f"layer_spec={TE}: Transformer Engine is not installed; pip install 'gemma4-bridge[te]'")
    if not torch.cuda.is_available():
        raise UsageError(f"layer_spec={TE}: Transformer Engine runs on a GPU, and none is visible")
    if fp8 != "none" and dtype is not torch.bfloat16:
        raise UsageError(f"fp8={fp8} needs a model in bfloat16, this one is {str(dtype).removeprefix('torch.')}")


def check_fp8_experts(geometry: Geometry, parallel: Parallel, dtype: str) -> None:
    """Whether the experts of a model can multiply in FP8, as far as can be said anywhere. Raises UsageError."""
    if geometry.moe is None:
        raise UsageError("fp8_experts=true is for models with experts, and this one has none")
    if dtype != "bfloat16":
        raise UsageError(f"fp8_experts=true needs a model in bfloat16, this one is {dtype}")
    width = geometry.moe.ffn_hidden_size // parallel.etp
    for name, size in (("hidden_size", geometry.hidden_size), (f"experts' width at etp={parallel.etp}", width)):
        if size % FP8_MULTIPLE:
            raise UsageError(f"fp8_experts=true: {name} is {size}, no multiple of {FP8_MULTIPLE}")


def check_fp8_gpu() -> None:
    """Whether there is a GPU here that multiplies experts in FP8. Raises UsageError."""
    import torch

    if not torch.cuda.is_available():
        raise UsageError("fp8_experts=true: FP8 products of experts run on a GPU, and none is visible")
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        said = ".".join(map(str, capability))
        raise UsageError(f"fp8_experts=true needs a GPU of compute capability 9.0 (H100, H200), this one has {said}")
