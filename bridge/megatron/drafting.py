"""All positions of a batch drafted at once: what one pass of a target leaves, and the steps of its drafter on it.

Step k at position t is given token t + k, and the state of step k - 1 at t: the target's own at first. It stands at
position t + 1 in every step, attends to the target's keys and values up to t, and predicts token t + k + 1. So does
transformers' `SinglePositionMultiTokenCandidateGenerator` behind token t, with the tokens that it drafted itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_pg_rank, get_pg_size, unwrap_model
from torch import Tensor

from bridge.megatron.attention import KeyValue
from bridge.megatron.drafter import Gemma4Drafter, TargetEmbedding
from bridge.megatron.loss import LossContext, fused_loss
from bridge.megatron.model import Gemma4Model, described
from bridge.megatron.rope import rotary_tables
from bridge.megatron.visibility import Visibility
from bridge.megatron.zigzag import Zigzag


@dataclass(frozen=True)
class TargetPass:
    """What the last stage of a target has after a forward pass.

    `states` [s (/tp), b, H] behind the final norm; `kv` by layer; `input_ids` [b, s] are the whole rows. `visibility`
    and `position_ids` [b, s / cp] are of this rank's part, `document` [b, s] of the whole rows. `losses` [b, s / cp]:
    the target's own, where they were asked for.
    """

    states: Tensor
    kv: Mapping[int, KeyValue]
    input_ids: Tensor
    visibility: Visibility
    position_ids: Tensor
    zigzag: Zigzag | None
    losses: Tensor | None = None

    def detached(self) -> TargetPass:
        """Without a way back to the target for the gradient of what reads it."""
        kv = {source: KeyValue(*(tensor.detach() for tensor in each)) for source, each in self.kv.items()}
        return replace(self, states=self.states.detach(), kv=kv)

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of whole rows [b, s]."""
        return whole if self.zigzag is None else self.zigzag.take(whole)


def run_target(
    chunk: torch.nn.Module,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    packed_seq_params: PackedSeqParams | None = None,
    mm_token_type_ids: Tensor | None = None,
    visibility: Visibility | None = None,
    loss: LossContext | None = None,
    **given: Any,
) -> Tensor | TargetPass:
    """One stage's pass over what `Gemma4Model.forward` takes: a payload, or at last a pass. `chunk`: in DDP or without.

    `loss`: what its own losses are made with, of `labels`, and it gets gradients; else there are none.
    """
    (model,) = unwrap_model([chunk])
    assert isinstance(model, Gemma4Model)
    seen, position_ids = described(
        input_ids, position_ids, attention_mask, packed_seq_params, mm_token_type_ids, visibility
    )
    assert isinstance(seen, Visibility)
    with torch.set_grad_enabled(loss is not None and torch.is_grad_enabled()):
        output = chunk(
            input_ids,
            position_ids,
            mm_token_type_ids=mm_token_type_ids,
            visibility=seen,
            output_processor=_begun,
            output_processor_context=loss,
            **given,
        )
    if not model.post_process:
        return output
    zigzag = None
    if model.pg_collection.cp.size() > 1:
        zigzag = Zigzag.of(input_ids.shape[1], model.pg_collection.cp)
        seen, position_ids = seen.on(zigzag), zigzag.take(position_ids)
    states, losses = output
    return TargetPass(states, dict(model.decoder.published), input_ids, seen, position_ids, zigzag, losses)


def final_states(*, hidden_states: Tensor, **unused: Any) -> Tensor:
    """As Megatron's GPTModel calls an `output_processor`; `unused` are the arguments of others."""
    return hidden_states


def _begun(*, hidden_states: Tensor, context: LossContext | None, **others: Any) -> tuple[Tensor, Tensor | None]:
    """The same: what a drafter begins with, and the model's own losses, where they are made."""
    if context is None:
        return hidden_states, None
    return hidden_states, fused_loss(hidden_states=hidden_states, context=context, **others)


def draft(
    drafter: torch.nn.Module, embed: TargetEmbedding, target: TargetPass, steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The steps of a draft behind every token: hidden states [s (/tp), b, h] and next states [s (/tp), b, H] of each.

    `drafter`: a `Gemma4Drafter`, in DDP or without.
    """
    (model,) = unwrap_model([drafter])
    assert isinstance(model, Gemma4Drafter)
    rotary = rotary_tables(model.config.geometry, target.position_ids + 1, model.config.params_dtype)
    states = target.states
    for step in range(1, steps + 1):
        embeddings = embed(target.take(shifted(target.input_ids, step, model.config.geometry.pad_token_id or 0)))
        if model.config.sequence_parallel:
            group = model.pg_collection.tp
            embeddings = embeddings.chunk(get_pg_size(group))[get_pg_rank(group)]
        hidden, states = drafter(
            embeddings.to(states.dtype), states, rotary=rotary, visibility=target.visibility, kv=dict(target.kv)
        )
        yield hidden, states


def shifted(rows: Tensor, by: int, filler: int) -> Tensor:
    """`rows` [b, s, ...] with what stands `by` places further on in each place, `filler` behind their end."""
    by = min(by, rows.shape[1])
    return torch.cat([rows[:, by:], rows.new_full((len(rows), by, *rows.shape[2:]), filler)], dim=1)
