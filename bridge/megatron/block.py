"""The decoder of one pipeline stage: its layers, what they share, and what enters and leaves the stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.utils import get_pg_size, make_viewless_tensor
from torch import Tensor

from bridge.geometry import LayerKind
from bridge.megatron.attention import KeyValue
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.kv_cache import CachedStep
from bridge.megatron.layer import layer_spec
from bridge.megatron.layer_options import layer_linears
from bridge.megatron.norm import RMSNorm
from bridge.megatron.pipeline import Boundary
from bridge.megatron.ple import PerLayerEmbedding
from bridge.megatron.rope import Rotary
from bridge.megatron.visibility import Visibility, mask_rule


class Gemma4Block(TransformerBlock):
    """A TransformerBlock with a loop of its own: layers pass keys and values on, and take per-layer inputs."""

    def __init__(
        self,
        config: Gemma4TransformerConfig,
        layers: range,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None,
    ) -> None:
        backends = dict(config.attention_backends)
        geometry = config.geometry
        linears = layer_linears(config.layer_spec, config.fake_quant)
        specs = [
            layer_spec(geometry, layer, mask_rule(geometry, layer, config.vision_mask), backends[layer.kind], linears)
            for layer in geometry.layers[layers.start : layers.stop]
        ]
        super().__init__(
            config,
            TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        tp_size, sp = get_pg_size(pg_collection.tp), config.sequence_parallel
        self.entry = Boundary.before(geometry, layers.start, tp_size, sp, config.published_kv)
        self.exit = Boundary.before(geometry, layers.stop, tp_size, sp, config.published_kv)
        self.published: dict[int, KeyValue] = {}
        self.ple: PerLayerEmbedding | None = None
        if geometry.ple is not None:
            self.ple = PerLayerEmbedding(config, layers, pg_collection)

    def forward(
        self,
        hidden_states: Tensor | None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Tensor,
        rotary: dict[LayerKind, Rotary],
        visibility: Visibility | CachedStep,
        external_kv: dict[int, KeyValue] | None = None,
        **unused: Any,
    ) -> Tensor:
        """The input embeddings [s (/tp), b, h] on the first stage, else None: then what `set_input_tensor` was given.

        `external_kv`: of another model's layers, which those of a drafter read. What another model reads of this one
        (`config.published_kv`) is in `published` after the last stage's pass.

        Returns hidden states, final-normed on the last stage; on the others the payload of the boundary. `unused` are
        Megatron's own arguments (rotary, inference, masks), which `rotary` and `visibility` replace.
        """
        slots = self.config.pipeline_payload
        kv: dict[int, KeyValue] = dict(external_kv or {})
        embeds: Tensor | None
        if self.pre_process:
            assert hidden_states is not None
            state = embeds = hidden_states
            if torch.is_grad_enabled() and not state.requires_grad:
                # Frozen embeddings. What is recomputed hands out gradients only where an argument asks for one, and a
                # pipeline stage sends back what its input gets: both are cut off by an input that asks for none. The
                # per-layer inputs are made of the embeddings as they are: frozen too, they need no backward pass.
                state = state.detach().requires_grad_()
        else:
            payload = make_viewless_tensor(self.input_tensor, requires_grad=True, keep_graph=True)
            state, embeds, kv = self.entry.unpack(payload, slots)
        # All at once: every slice by itself would give a gradient of the size of all layers.
        ple = self.ple(input_ids, embeds).unbind(2) if self.ple is not None else None

        if isinstance(visibility, CachedStep):
            state, kv = self._run_cached(state, ple, kv, rotary, visibility)
        else:
            for start, stop, recompute in self._groups():
                state, kv = self._run(start, stop, state, ple, kv, rotary, visibility, recompute)

        if self.post_process:
            self.published = {source: kv[source] for source in self.config.published_kv}
        if self.final_layernorm is not None:
            state = self.final_layernorm(state)
        if not self.post_process:
            state = self.exit.pack(state, embeds, kv, slots)
        return make_viewless_tensor(state, requires_grad=state.requires_grad, keep_graph=True)

    def _run_cached(
        self,
        state: Tensor,
        ple: Sequence[Tensor] | None,
        kv: dict[int, KeyValue],
        rotary: dict[LayerKind, Rotary],
        step: CachedStep,
    ) -> tuple[Tensor, dict[int, KeyValue]]:
        """Every layer of the stage for new tokens of `step`; on the last stage only the last token of each row is left.

        The layers at the end that share K/V make none, so that nobody reads what they make of earlier tokens.
        """
        count = len(self.layers)
        readers = next((i for i, layer in enumerate(self.layers) if layer.layer.shares_kv), count)
        if readers:
            state, kv = self._run(0, readers, state, ple, kv, rotary, step, False)
        if readers < count:
            state = step.take_last(state)
            ple = None if ple is None else [*ple[:readers], *(step.take_last(x) for x in ple[readers:])]
            state, kv = self._run(readers, count, state, ple, kv, step.rotary(rotary), step.last, False)
            return (state if self.post_process else step.put_back(state)), kv
        return (step.take_last(state) if self.post_process else state), kv

    def _groups(self) -> list[tuple[int, int, bool]]:
        """Layers that run together: the first, the one behind the last, and whether the backward pass repeats them."""
        end = len(self.layers)
        if self.config.recompute_granularity != "full" or not self.training:
            return [(0, end, False)]
        count = min(self.config.recompute_num_layers or 1, end)
        if self.config.recompute_method == "block":  # so many layers of a stage, singly, and none of the others
            rest = [(count, end, False)] if count < end else []
            return [(i, i + 1, True) for i in range(count)] + rest
        return [(i, min(i + count, end), True) for i in range(0, end, count)]

    def _run(
        self,
        start: int,
        stop: int,
        hidden_states: Tensor,
        ple: Sequence[Tensor] | None,
        kv: dict[int, KeyValue],
        rotary: dict[LayerKind, Rotary],
        visibility: Visibility | CachedStep,
        recompute: bool,
    ) -> tuple[Tensor, dict[int, KeyValue]]:
        """Layers [start, stop) of the stage, recomputed in the backward pass or not; returns what later layers read."""
        incoming = sorted(kv)
        outgoing = self._still_read(stop, kv)
        inputs: Sequence[Tensor] = () if ple is None else ple[start:stop]

        def run(hidden_states: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
            per_layer, flat = flat[: len(inputs)], flat[len(inputs) :]
            shared = {source: KeyValue(*flat[2 * i : 2 * i + 2]) for i, source in enumerate(incoming)}
            for i in range(start, stop):
                layer = self.layers[i]
                source = layer.layer.kv_source
                hidden_states, layer_kv = layer(
                    hidden_states,
                    rotary[layer.layer.kind],
                    visibility,
                    per_layer[i - start] if per_layer else None,
                    shared.get(source) if layer.layer.shares_kv else None,
                )
                if not layer.layer.shares_kv:
                    shared[source] = layer_kv
            return hidden_states, *(tensor for source in outgoing for tensor in shared[source])

        # Every tensor that needs a gradient is an argument: what a checkpointed function closes over gets none.
        flat = [tensor for source in incoming for tensor in kv[source]]
        if recompute:
            outputs = tensor_parallel.checkpoint(run, False, hidden_states, *inputs, *flat)
        else:
            outputs = run(hidden_states, *inputs, *flat)
        hidden_states, *flat = outputs
        return hidden_states, {source: KeyValue(*flat[2 * i : 2 * i + 2]) for i, source in enumerate(outgoing)}

    def _still_read(self, stop: int, kv: dict[int, KeyValue]) -> list[int]:
        """Layers up to `stop` of this stage, or of earlier ones, whose K/V a later layer or another model reads."""
        geometry = self.config.geometry
        end = self.layers[stop - 1].layer.index + 1
        later = {layer.kv_source for layer in geometry.layers[end:] if layer.external_kv or layer.kv_source < end}
        return sorted(later | {source for source in self.config.published_kv if source < end})
