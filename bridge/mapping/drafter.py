"""What a drafter has beside its decoder: the way in from the target, the way back, and clusters of its vocabulary."""

from __future__ import annotations

from bridge.mapping.table import Condition, Row

IS_DRAFTER = Condition("drafter", lambda geometry, layer: geometry.drafter is not None)
ORDERED = Condition(
    "drafter with ordered embeddings", lambda g, layer: g.drafter is not None and g.drafter.num_centroids is not None
)

DRAFTER: tuple[Row, ...] = (
    Row(
        "pre_projection.weight",
        ("/pre_projection.weight",),
        (("hidden", "2*backbone"),),
        shard=(None, None),
        when=IS_DRAFTER,
    ),
    Row(
        "post_projection.weight",
        ("/post_projection.weight",),
        (("backbone", "hidden"),),
        shard=(None, None),
        when=IS_DRAFTER,
    ),
    Row(
        "masked_embedding.centroids.weight",
        ("/masked_embedding.centroids.weight",),
        (("centroids", "hidden"),),
        shard=(None, None),
        when=ORDERED,
    ),
    Row(
        "masked_embedding.token_ordering",
        ("/masked_embedding.token_ordering",),
        (("vocab",),),
        when=ORDERED,
        trainable=False,
        integer=True,
    ),
)
