"""The `ffpa-attn` package (not installed with this one): causal attention at head dim 512 on Hopper GPUs.

Written from its interface and not run here, where there is no such GPU.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from bridge.megatron.mask import Mask
from bridge.megatron.visibility import send

_HEAD_DIM = 512
_HOPPER = (9, 0)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Tensor:
    """[s, b, heads, 512], and [s, b, groups, 512] twice -> [s, b, heads, 512]; bf16 or fp16."""
    from ffpa_attn import ffpa_attn_varlen_func  # type: ignore[import-not-found]

    bounds, longest = _documents(mask)
    output = ffpa_attn_varlen_func(
        *(x.transpose(0, 1).flatten(0, 1).contiguous() for x in (query, key, value)),
        bounds,
        bounds,
        longest,
        longest,
        softmax_scale=1.0,
        causal=True,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.unflatten(0, (query.shape[1], -1)).transpose(0, 1)


def refuse(query: Tensor, key: Tensor, mask: Mask) -> str | None:
    """Causal documents, head dim 512, half precision, a Hopper GPU, and the package."""
    if not query.is_cuda or torch.cuda.get_device_capability(query.device) != _HOPPER:
        return "it needs a Hopper GPU"
    if not _installed():
        return "the package ffpa-attn is not installed"
    if query.shape[-1] != _HEAD_DIM or query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes head dim {_HEAD_DIM} in bfloat16 or float16"
    if mask.rows != mask.columns:
        return "queries are a part of the row"
    if not mask.causal:
        return "it is causal within documents only"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("ffpa_attn") is not None


def _documents(mask: Mask) -> tuple[Tensor, int]:
    """Where documents begin in the rows laid end to end, int32, and the length of the longest."""
    made = mask.cache.get("ffpa")
    if made is None:
        device = mask.visibility.document.device
        document = mask.on_host.visibility.document
        starts = torch.ones_like(document, dtype=torch.bool)
        starts[:, 1:] = document[:, 1:] != document[:, :-1]
        end = torch.tensor([document.numel()], device=document.device)
        bounds = torch.cat([starts.flatten().nonzero().squeeze(1), end]).to(torch.int32)
        made = mask.cache["ffpa"] = (send(bounds, device), int(bounds.diff().max()))
    assert isinstance(made, tuple)
    return made
