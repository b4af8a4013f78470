"""What a token may see: a description, not a tensor.

A `Visibility` says of every token of a batch which document it belongs to, where in its row it stands, and which vision
block it is part of. A `MaskRule` says what a layer makes of that. An attention backend turns both into what its kernel
wants; only the reference backend ever builds [s, s].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bridge.errors import UsageError
from bridge.geometry import Geometry, LayerGeometry

# Token types of the processors: image, video (mm_token_type_ids).
_VISION_TYPES = (1, 2)


@dataclass(frozen=True)
class MaskRule:
    """How a layer masks. `window` in tokens; `blocks`: what tokens of one vision block see of each other.

    "causal": nothing special. "windowed": everything not further back than the window (26B, 31B sliding).
    "full": everything (12B).
    """

    window: int | None
    blocks: Literal["causal", "windowed", "full"]


def mask_rule(geometry: Geometry, layer: LayerGeometry) -> MaskRule:
    """The rule of one layer. The families differ: see `create_causal_mask` calls in both modeling files."""
    if not geometry.bidirectional_vision:
        return MaskRule(layer.window, "causal")
    if geometry.unified:
        return MaskRule(layer.window, "full")
    return MaskRule(layer.window, "windowed" if layer.kind == "sliding" else "causal")


@dataclass(frozen=True)
class Visibility:
    """One batch. All tensors are [b, s] int64.

    `document`: tokens of different documents never see each other; padding has a document of its own (-1).
    `index`: place in the row; what is causal and how far back a window reaches are measured on it.
    `block`: number of the vision block, -1 outside of one; None where there are none.
    """

    document: Tensor
    index: Tensor
    block: Tensor | None = None
    _dense: dict[MaskRule, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> Visibility:
        """Describe a batch [b, s]: from a padding mask [b, s] (1 = real), or the bounds of documents packed in one row.

        Raises UsageError for a mask of another shape: what [b, 1, s, s] masks say, documents and blocks say here.
        """
        batch, length = input_ids.shape
        index = torch.arange(length, device=input_ids.device).expand(batch, length)
        document = torch.zeros_like(index)
        if cu_seqlens is not None:
            if batch != 1:
                raise UsageError(f"packed documents come in one row, not in a batch of {batch}")
            document = torch.bucketize(index, cu_seqlens[1:].to(index), right=True)
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise UsageError(
                    f"attention_mask has shape {list(attention_mask.shape)}, "
                    f"expected {[batch, length]} (1 = real token)"
                )
            document = document.masked_fill(attention_mask == 0, -1)
        return cls(document, index, vision_blocks(mm_token_type_ids))

    def dense(self, rule: MaskRule) -> Tensor:
        """[b, s, s] bool, True where query i (axis 1) sees key j (axis 2). Built once a step and rule."""
        if rule not in self._dense:
            distance = self.index[:, :, None] - self.index[:, None, :]
            same_document = self.document[:, :, None] == self.document[:, None, :]
            near = distance < rule.window if rule.window is not None else torch.ones_like(same_document)
            visible = (distance >= 0) & near
            if self.block is not None and rule.blocks != "causal":
                same_block = (self.block[:, :, None] == self.block[:, None, :]) & (self.block >= 0)[:, :, None]
                visible = visible | (same_block & near if rule.blocks == "windowed" else same_block)
            self._dense[rule] = visible & same_document
        return self._dense[rule]


def vision_blocks(mm_token_type_ids: Tensor | None) -> Tensor | None:
    """Number the maximal runs of image or video tokens of each row; -1 elsewhere. [b, s] -> [b, s]."""
    if mm_token_type_ids is None:
        return None
    vision = torch.isin(mm_token_type_ids, torch.tensor(_VISION_TYPES, device=mm_token_type_ids.device))
    starts = vision.clone()
    starts[:, 1:] &= ~vision[:, :-1]
    return torch.where(vision, starts.cumsum(dim=1) - 1, -1)
