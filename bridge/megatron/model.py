"""Gemma 4 as a Megatron-Core GPTModel."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from bridge.megatron.block import Gemma4Block
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.embedding import held_rows, padded_size, require_rows, scale_embeddings
from bridge.megatron.kv_cache import CachedStep
from bridge.megatron.linear import adapter_items
from bridge.megatron.loss import LossContext, fused_loss
from bridge.megatron.rope import rotary_tables
from bridge.megatron.sharding import without_padding
from bridge.megatron.visibility import Visibility
from bridge.megatron.zigzag import Zigzag


class Gemma4Model(GPTModel):
    """One stage of a Gemma 4 decoder. `layers` are the numbers of its layers, 0-based.

    `adapter_table`: of the adapters that the whole model has (`bridge.lora.inject`); an `AdapterTable`, or None.
    """

    adapter_table: Any = None

    def __init__(
        self,
        config: Gemma4TransformerConfig,
        layers: range,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        geometry = config.geometry
        # GPTModel builds its own block; it is given no layers, and replaced by the one that runs Gemma 4's loop.
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=[], layer_norm=None),
            vocab_size=padded_size(geometry.vocab_size, get_pg_size(pg_collection.tp)),
            max_sequence_length=geometry.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=geometry.tied,
            position_embedding_type="none",
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if pre_process:
            # As in `megatron.linear`.
            self.embedding.word_embeddings.adapters = torch.nn.ModuleDict()
        self.decoder = Gemma4Block(config, layers, pre_process, post_process, pg_collection, vp_stage)
        self.clear_padding()

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Make the rows zeros that fill up vocabularies (`embedding.py`); whatever fills parameters calls it."""
        geometry, tables = self.config.geometry, []
        if self.pre_process:
            tables.append((self.embedding.word_embeddings.weight, geometry.vocab_size))
        if self.post_process and self.output_layer.weight is not None:
            tables.append((self.output_layer.weight, geometry.vocab_size))
        if self.decoder.ple is not None:
            tables.append((self.decoder.ple.embed_tokens.weight, geometry.ple.vocab_size))
        for weight, size in tables:
            weight[held_rows(size, len(weight), get_pg_rank(self.pg_collection.tp)) :].zero_()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Scaled input embeddings [s (/tp), b, h] of `input_ids` [b, s]. Raises UsageError: see `require_rows`."""
        geometry = self.config.geometry
        require_rows(input_ids, geometry.vocab_size, "embed_tokens")
        rows = self.embedding(input_ids=input_ids, position_ids=None)
        return scale_embeddings(
            rows,
            input_ids,
            geometry.pad_token_id,
            geometry.hidden_size,
            self.config,
            self.embedding.word_embeddings,
        )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        mm_token_type_ids: Tensor | None = None,
        z_loss: float = 0.0,
        visibility: Visibility | CachedStep | None = None,
        label_positions: Tensor | None = None,
        *,
        squares: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Logits [b, s / cp, vocab / tp], or token losses [b, s / cp] where `labels` are given; a payload elsewhere.

        A vocabulary that `tp` does not divide is filled up at its end, on the last rank, with logits of -inf.

        Losses are float32, 0 where the label is -100, and made without the logits (see `loss.py`); `z_loss` is a
        factor for them, and what it is a factor of is added to `squares` (float64 [b, s / cp]). An `output_processor`
        of the caller's takes precedence.

        `input_ids` [b, s] is needed on every stage. `attention_mask` is [b, s], 1 = real token; nothing else is a mask
        here. `packed_seq_params`: documents packed in one row, whose `cu_seqlens_q` (or `_padded`) bound them.
        `position_ids` [b, s] count from 0 in every document when absent. `visibility`: what the masks say, and
        `label_positions`: `positions_with_labels` of this rank's part, where the caller has made them on the host.

        Under context parallelism every rank is given the whole rows and computes its part of them, which
        `bridge.megatron.context_parallel.take` cuts out of anything else; only `decoder_input` is that part already.
        A `CachedStep` is not divided: its ranks have rows of their own, as data-parallel ones have.
        """
        visibility, position_ids = described(
            input_ids, position_ids, attention_mask, packed_seq_params, mm_token_type_ids, visibility
        )
        if self.pg_collection.cp.size() > 1 and isinstance(visibility, Visibility):
            zigzag = Zigzag.of(input_ids.shape[1], self.pg_collection.cp)
            visibility = visibility.on(zigzag)
            input_ids, position_ids = zigzag.take(input_ids), zigzag.take(position_ids)
            labels = None if labels is None else zigzag.take(labels)
        if self.pre_process and decoder_input is None:
            decoder_input = self.embed(input_ids)
        block = {
            "input_ids": input_ids,
            "rotary": rotary_tables(self.config.geometry, position_ids, self.config.params_dtype),
            "visibility": visibility,
        }
        if labels is not None and kwargs.get("output_processor") is None:
            context = LossContext(z_loss, label_positions, squares)
            kwargs |= {"output_processor": fused_loss, "output_processor_context": context}
        return super().forward(input_ids, position_ids, None, decoder_input, labels, extra_block_kwargs=block, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Without the empty `_extra_state` entries of Megatron's own linears: they hold nothing, checkpoints need not
        have them, and strict loading asks for whatever is named here. Without the rows that fill up the vocabulary.
        Adapters are cut as their weights are. Layers differ, whether or not `metadata` says so."""
        metadata = {"non_homogeneous_layers": True, **(metadata or {})}
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {
            key: item
            for key, item in state.items()
            if not (key.endswith("_extra_state") and isinstance(item, ShardedObject) and item.data is None)
        }
        for name in (f"{prefix}embedding.word_embeddings.weight", f"{prefix}output_layer.weight"):
            if name in state:
                state[name] = without_padding(state[name], self.config.geometry.vocab_size)
        return state | adapter_items(self, state)

    def _scale_logits(self, logits: Tensor) -> Tensor:
        """The softcap of [s, b, vocab / tp], in their dtype, and -inf for the columns that fill up the vocabulary.

        Megatron calls this between the head and the loss.
        """
        geometry, columns = self.config.geometry, logits.shape[-1]
        cap = geometry.logit_softcap
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        words = held_rows(geometry.vocab_size, columns, get_pg_rank(self.pg_collection.tp))
        if words == columns:
            return logits
        return logits.masked_fill(torch.arange(columns, device=logits.device) >= words, float("-inf"))


def described(
    input_ids: Tensor,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    packed_seq_params: PackedSeqParams | None,
    mm_token_type_ids: Tensor | None,
    visibility: Visibility | CachedStep | None,
) -> tuple[Visibility | CachedStep, Tensor]:
    """What `Gemma4Model.forward` makes of whole rows: who sees whom, and positions [b, s]."""
    cu_seqlens = None if packed_seq_params is None else _bounds(packed_seq_params)
    if visibility is None:
        visibility = Visibility.of(input_ids, attention_mask, cu_seqlens, mm_token_type_ids)
    if isinstance(visibility, CachedStep):
        return visibility, visibility.position_ids
    if position_ids is None:
        position_ids = visibility.index
        if cu_seqlens is not None:
            position_ids = position_ids - cu_seqlens.to(position_ids)[visibility.document.clamp(min=0)]
    return visibility, position_ids


def _bounds(packed: PackedSeqParams) -> Tensor:
    """Where documents begin in the row, padding between them included: a document's padding is behind its tokens."""
    return packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
