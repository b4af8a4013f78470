"""Drafters (transformers `gemma4_assistant`): small decoders that read a target's K/V, and draft its tokens.

What they are beside a decoder is read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bridge.errors import GeometryError
from bridge.geometry.fields import Fields, short

_DEFAULTS: dict[str, Any] = {
    "text_config": None,
    "backbone_hidden_size": 1536,
    "use_ordered_embeddings": False,
    "num_centroids": 2048,
    "centroid_intermediate_top_k": 32,
    "tie_word_embeddings": True,
    "quantization_config": None,
}
# By model_type, as transformers' config classes have them.
DRAFTER_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": _DEFAULTS,
    "gemma4_unified_assistant": _DEFAULTS | {"backbone_hidden_size": 3840},
}


@dataclass(frozen=True)
class DrafterGeometry:
    """What a drafter has beside its decoder.

    `backbone_hidden_size` is the target's hidden size. `num_centroids`: clusters of the vocabulary, of which the head
    computes the logits of the `topk` likeliest ones' tokens only (ordered embeddings); None: of every token.
    """

    backbone_hidden_size: int
    num_centroids: int | None
    topk: int


def read_drafter(top: Fields, vocab_size: int) -> DrafterGeometry:
    """Raises GeometryError."""
    hidden = top.positive("backbone_hidden_size")
    if not top.flag("use_ordered_embeddings"):
        return DrafterGeometry(hidden, None, 0)
    centroids, topk = top.positive("num_centroids"), top.positive("centroid_intermediate_top_k")
    if vocab_size % centroids:
        raise GeometryError(f"num_centroids {centroids} does not divide the {vocab_size} tokens of the vocabulary")
    if topk > centroids:
        raise GeometryError(f"centroid_intermediate_top_k {topk} is more than num_centroids {centroids}")
    return DrafterGeometry(hidden, centroids, topk)


def check_text(text: Fields, unified: bool, notices: list[str]) -> None:
    """Refuse what transformers refuses in a drafter's text_config. Raises GeometryError."""
    if not unified:
        # In the drafter's own words: 0 is not the default of these.
        for key in ("hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            if text[key] != 0:
                raise GeometryError(f"{text.where(key)} is {short(text[key])}; a drafter has 0")
        text.must("enable_moe_block", False, "no drafter has experts")
    text.must("use_double_wide_mlp", False, "no drafter has it")
    layers = text.positive("num_hidden_layers")
    if text["num_kv_shared_layers"] not in (0, layers):
        given = short(text["num_kv_shared_layers"])
        raise GeometryError(
            f"{text.where('num_kv_shared_layers')} is {given}; of a drafter's {layers} layers all share"
        )
    if text["final_logit_softcapping"] is not None:
        notices.append(f"{text.where('final_logit_softcapping')} does not count: a drafter's head has no softcap")
