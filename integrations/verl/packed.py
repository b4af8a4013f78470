"""A microbatch of verl, rows of several lengths in one nested tensor, as one packed row of this bridge; and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron.multimodal import MediaTensors
from bridge.token_ids import IGNORE

MEDIA = frozenset(field.name for field in fields(MediaTensors))
# What Gemma 4's processors give besides: token types, which the placeholders say too, and counts for themselves.
_BESIDE = {"mm_token_type_ids", "num_soft_tokens_per_image", "num_soft_tokens_per_video", "token_type_ids"}


@dataclass(frozen=True)
class PackedRow:
    """Documents behind each other, [1, s]: `labels` are the tokens that follow, `IGNORE` behind the last of each.

    `offsets` [rows + 1] of the documents; behind the last of them padding may follow, a document of its own.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    params: PackedSeqParams
    mm_token_type_ids: Tensor | None
    offsets: Tensor

    def nested(self, values: Tensor) -> Tensor:
        """Values [1, s] of tokens, as verl has them: nested [rows, tokens]."""
        return torch.nested.nested_tensor_from_jagged(values[0, : int(self.offsets[-1])], offsets=self.offsets)


def pack(input_ids: Tensor, geometry: Geometry, multiple: int, prompts: Tensor | None = None) -> PackedRow:
    """`input_ids`, nested [rows, tokens], in a row whose length is a multiple of `multiple`.

    `prompts` [rows]: how many tokens of each are not an answer. A placeholder in an answer was sampled, and stands for
    no picture: the model reads padding there.
    """
    values, offsets = input_ids.values(), input_ids.offsets()  # type: ignore[attr-defined]
    labels = torch.cat([values[1:], values.new_tensor([IGNORE])])
    labels[offsets[1:] - 1] = IGNORE
    if geometry.placeholders is not None and prompts is not None:
        begins = (offsets[:-1] + prompts).repeat_interleave(offsets.diff())
        sampled = torch.arange(len(values), device=values.device) >= begins
        stray = sampled & torch.isin(values, values.new_tensor(sorted(geometry.placeholder_ids)))
        values = values.masked_fill(stray, geometry.pad_token_id or 0)
    padding = -len(values) % multiple
    mask = torch.ones_like(values)
    bounds = offsets
    if padding:
        values = torch.nn.functional.pad(values, (0, padding), value=geometry.pad_token_id or 0)
        labels = torch.nn.functional.pad(labels, (0, padding), value=IGNORE)
        mask = torch.nn.functional.pad(mask, (0, padding))
        bounds = torch.cat([offsets, offsets[-1:] + padding])
    bounds = bounds.to(torch.int32)
    types = None
    if geometry.placeholders is not None:
        types = torch.zeros_like(values)
        for number, kind in enumerate(("image", "video"), start=1):
            token = geometry.placeholders.by_kind.get(kind)
            if token is not None:
                types = types.masked_fill(values == token, number)
    return PackedRow(
        values[None],
        labels[None],
        mask[None],
        PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds),
        None if types is None else types[None],
        offsets,
    )


def media_of(inputs: Mapping[str, Any], geometry: Geometry) -> dict[str, Tensor]:
    """Of verl's `multi_modal_inputs`, joined over the rows, what the model takes. Raises UsageError."""
    unknown = set(inputs) - MEDIA - _BESIDE
    if unknown:
        raise UsageError(f"multi_modal_inputs has {min(unknown)}, which Gemma 4 does not take")
    found = {name: value for name, value in inputs.items() if name in MEDIA}
    if found and not geometry.multimodal:
        raise UsageError(f"multi_modal_inputs has {min(found)}, but this model reads text alone")
    return found


def prompt_lengths(batch: Any) -> Tensor | None:
    """Of the rows of a microbatch [rows]; None where it says nothing of prompts."""
    prompts = batch.get("prompts", None)
    if prompts is None:
        return None
    if prompts.is_nested:
        return prompts.offsets().diff()
    return batch["attention_mask"][:, : prompts.shape[1]].sum(1)
