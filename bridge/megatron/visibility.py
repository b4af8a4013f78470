"""What a token may see: a description, not a tensor.

A `Visibility` says of every token of a batch which document it belongs to, where in its row it stands, and which vision
block it is part of. A `MaskRule` says what a layer makes of that. Together they give every query one interval of keys
(`Visibility.reach`): that is all the fast backends need; only the reference backend, and the one for short rows, build
[s, s].
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bridge.errors import UsageError
from bridge.geometry import Geometry, LayerGeometry
from bridge.megatron.zigzag import Zigzag

# Token types of the processors: image, video (mm_token_type_ids).
_VISION_TYPES = (1, 2)
# Whose masks of images are meant, where transformers has two (`check_vision_mask`).
GENERATE, FORWARD = VISION_MASKS = ("generate", "forward")


@dataclass(frozen=True)
class MaskRule:
    """How a layer masks. `window` in tokens; `blocks`: what tokens of one vision block see of each other.

    "causal": nothing special. "windowed": everything not further back than the window. "full": everything.
    """

    window: int | None
    blocks: Literal["causal", "windowed", "full"]

    def __str__(self) -> str:
        window = "causal" if self.window is None else f"window {self.window}"
        return window if self.blocks == "causal" else f"{window} with {self.blocks} vision blocks"


def mask_rule(geometry: Geometry, layer: LayerGeometry, vision_mask: str = GENERATE) -> MaskRule:
    """The rule of one layer.

    `vision_mask`: whose rule, where transformers contradicts itself (`check_vision_mask`). "generate": that of its
    `create_masks_for_generate`, which models are served by. "forward": that of its `forward`.
    """
    if layer.external_kv:
        # It sees no token of its own model, and in transformers' classes `window` tokens of the target and one more.
        return MaskRule(None if layer.window is None else layer.window + 1, "causal")
    if not geometry.bidirectional_vision:
        return MaskRule(layer.window, "causal")
    if vision_mask == FORWARD:
        return MaskRule(layer.window, "full")
    return MaskRule(layer.window, "windowed" if layer.kind == "sliding" else "causal")


def vision_masks(geometry: Geometry) -> tuple[str, ...]:
    """The values of `vision_mask` that there are for a model (`check_vision_mask`)."""
    return VISION_MASKS if geometry.unified and geometry.bidirectional_vision else (GENERATE,)


def check_vision_mask(geometry: Geometry, vision_mask: str) -> None:
    """Raise UsageError for a `vision_mask` that there is not, or not for this model.

    In transformers 5.24 `Gemma4UnifiedModel.forward` lets a vision block see itself in every layer, past the window,
    and `create_masks_for_generate` of the same class does not. In the other classes both make the same masks.
    """
    if vision_mask not in VISION_MASKS:
        raise UsageError(f"vision_mask={vision_mask}: is one of {', '.join(VISION_MASKS)}")
    if vision_mask not in vision_masks(geometry):
        raise UsageError(
            f"vision_mask={FORWARD}: in transformers' {geometry.architecture} `forward` masks as generation does; "
            f"leave it at {GENERATE}"
        )


class Reach(NamedTuple):
    """Query i sees key j exactly if `first[i] <= j < stop[i]` and both are of the same document. [b, s] int64 each."""

    first: Tensor
    stop: Tensor


@dataclass(frozen=True)
class Visibility:
    """One batch of whole rows, on every context-parallel rank. All tensors are [b, s] int64.

    `document`: tokens of different documents never see each other; padding has a document of its own (-1).
    `index`: place in the row, 0 to s - 1; what is causal and how far back a window reaches are measured on it.
    `block`: number of the vision block, a run of tokens; -1 outside of one; None where there are none.
    `zigzag`: which part of the rows this rank's queries are; None: all.
    `host`: the same on the CPU, where decisions are made that a kernel's launch depends on (what is contiguous, where
    tiles end); None: they are made here. On a GPU each would be a wait of the host for the device.
    """

    document: Tensor
    index: Tensor
    block: Tensor | None = None
    zigzag: Zigzag | None = None
    host: Visibility | None = None
    # What layers derive from the description, made by the first that asks, once a step.
    cache: dict[object, object] = field(default_factory=dict, repr=False, compare=False)

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
        for name, given in (("attention_mask", attention_mask), ("mm_token_type_ids", mm_token_type_ids)):
            if given is not None and given.shape != input_ids.shape:
                raise UsageError(f"{name} has shape {list(given.shape)}, expected {[batch, length]}")
        if attention_mask is not None:
            document = document.masked_fill(attention_mask == 0, -1)
        return cls(document, index, vision_blocks(mm_token_type_ids))

    def on(self, zigzag: Zigzag) -> Visibility:
        """The same rows, seen by one context-parallel rank's queries."""
        host = None if self.host is None else self.host.on(zigzag)
        return replace(self, zigzag=zigzag, host=host, cache={})

    def to(self, device: torch.device) -> Visibility:
        """A description on the CPU, for a model on `device`."""
        if device == self.document.device:
            return self
        document, index = send(self.document, device), send(self.index, device)
        block = None if self.block is None else send(self.block, device)
        return Visibility(document, index, block, self.zigzag, host=self)

    def dense(self, rule: MaskRule) -> Tensor:
        """[b, s, s] bool, True where query i (axis 1) sees key j (axis 2): the rule as written, for the oracle."""
        distance = self.index[:, :, None] - self.index[:, None, :]
        same_document = self.document[:, :, None] == self.document[:, None, :]
        near = distance < rule.window if rule.window is not None else torch.ones_like(same_document)
        visible = (distance >= 0) & near
        if self.block is not None and rule.blocks != "causal":
            same_block = (self.block[:, :, None] == self.block[:, None, :]) & (self.block >= 0)[:, :, None]
            visible = visible | (same_block & near if rule.blocks == "windowed" else same_block)
        return visible & same_document

    def reach(self, rule: MaskRule) -> Reach:
        """The keys of every query under `rule`, as an interval: in O(s), once a step.

        Under each rule a query sees a run behind it and the rest of its vision block, and is itself in both: their
        union has no gap.
        """
        reach = self.cache.get(rule)
        if reach is None and self.host is not None:
            reach = Reach(*(send(x, self.document.device) for x in self.host.reach(rule)))
            self.cache[rule] = reach
        if reach is None:
            reach = self.cache[rule] = self._reach(rule)
        assert isinstance(reach, Reach)
        return reach

    def _reach(self, rule: MaskRule) -> Reach:
        first = torch.zeros_like(self.index) if rule.window is None else self.index - (rule.window - 1)
        stop = self.index + 1
        if self.block is not None and rule.blocks != "causal":
            block = _hull(self.block, self.index)
            inside = self.block >= 0
            stop = torch.where(inside, torch.maximum(stop, block.stop), stop)
            if rule.blocks == "full":
                first = torch.where(inside, torch.minimum(first, block.first), first)
        document = _hull(self.document, self.index)
        return Reach(torch.maximum(first, document.first), torch.minimum(stop, document.stop))


def _hull(label: Tensor, index: Tensor) -> Reach:
    """For every token the places from the first to the last token with its label (-1 or more); [b, s]."""
    label = label + 1
    size = (label.shape[0], int(label.max()) + 1)
    lowest = torch.full(size, index.shape[1], device=index.device, dtype=index.dtype)
    first = lowest.scatter_reduce(1, label, index, "amin")
    last = torch.zeros_like(lowest).scatter_reduce(1, label, index, "amax")
    return Reach(first.gather(1, label), last.gather(1, label) + 1)


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, without a wait of the host: from pinned memory, behind the work in its queue."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.contiguous().pin_memory().to(device, non_blocking=True)


def vision_blocks(mm_token_type_ids: Tensor | None) -> Tensor | None:
    """Number the maximal runs of image or video tokens of each row; -1 elsewhere. [b, s] -> [b, s]."""
    if mm_token_type_ids is None:
        return None
    vision = torch.isin(mm_token_type_ids, torch.tensor(_VISION_TYPES, device=mm_token_type_ids.device))
    starts = vision.clone()
    starts[:, 1:] &= ~vision[:, :-1]
    return torch.where(vision, starts.cumsum(dim=1) - 1, -1)
