"""What a step has to compute: the FLOPs of its batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from bridge.flops import attention_flops, decoder_flops, head_flops
from bridge.geometry import Geometry
from bridge.mapping.modalities import MODALITIES
from bridge.megatron.visibility import GENERATE, Visibility, mask_rule
from bridge.token_ids import IGNORE


def training_flops(
    geometry: Geometry,
    batches: Sequence[Mapping[str, Tensor]],
    frozen: Collection[str] = (),
    adapters: bool = False,
    vision_mask: str = GENERATE,
) -> float:
    """FLOPs of forward and backward passes over batches as the data yields them (whole rows of one rank).

    Three times the forward pass, but of modalities in `frozen` once. With `adapters` the weights are frozen and no
    gradients of them are needed: twice; attention has no weights. The adapters' own products, about a hundredth, are
    not counted. The head counts where there is a label. `vision_mask`: see `mask_rule`.
    """
    linears, attention, modalities = _forward(geometry, batches, vision_mask)
    trained = 2.0 if adapters else 3.0
    of_modalities = sum((1.0 if modality in frozen else trained) * count for modality, count in modalities.items())
    return trained * linears + 3.0 * attention + of_modalities


def forward_flops(geometry: Geometry, batches: Sequence[Mapping[str, Tensor]], vision_mask: str = GENERATE) -> float:
    """FLOPs of a forward pass over such batches."""
    linears, attention, modalities = _forward(geometry, batches, vision_mask)
    return float(linears + attention + sum(modalities.values()))


def _forward(
    geometry: Geometry, batches: Sequence[Mapping[str, Tensor]], vision_mask: str
) -> tuple[int, int, dict[str, int]]:
    """(linears with the head, attention, each modality), forward."""
    linears, attention, modalities = 0, 0, dict.fromkeys(MODALITIES, 0)
    for batch in batches:
        of_linears, of_attention = _text_flops(geometry, batch, vision_mask)
        linears, attention = linears + of_linears, attention + of_attention
        for name, modality in MODALITIES.items():
            modalities[name] += modality.flops(geometry, batch)
    return linears, attention, modalities


def _text_flops(geometry: Geometry, batch: Mapping[str, Tensor], vision_mask: str) -> tuple[int, int]:
    """(linears with the head, attention), forward."""
    rows = {name: batch[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids") if name in batch}
    bounds = batch.get("cu_seqlens")
    if bounds is not None:  # they count through the rows laid end to end
        rows = {name: tensor.reshape(1, -1) for name, tensor in rows.items()}
    visibility = Visibility.of(rows["input_ids"], rows.get("attention_mask"), bounds, rows.get("mm_token_type_ids"))
    real = visibility.document >= 0
    linears = int(real.sum()) * decoder_flops(geometry) + int((batch["labels"] != IGNORE).sum()) * head_flops(geometry)
    attention = 0
    pairs: dict[object, int] = {}
    for layer in geometry.layers:
        rule = mask_rule(geometry, layer, vision_mask)
        if rule not in pairs:
            reach = visibility.reach(rule)
            pairs[rule] = int((reach.stop - reach.first)[real].sum())
        attention += pairs[rule] * attention_flops(layer)
    return linears, attention
