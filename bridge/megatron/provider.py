"""From a geometry and a parallel layout to Megatron models: what verl, NeMo-RL and Megatron's own loops call."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from megatron.core.pipeline_parallel.utils import is_pp_first_stage, is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.mapping.modalities import MODULES
from bridge.megatron import layer_options
from bridge.megatron.config import Gemma4TransformerConfig, gelu_tanh
from bridge.megatron.drafter import Gemma4Drafter
from bridge.megatron.fake_quant_schemes import check_fake_quant
from bridge.megatron.layout import check_layout, layout_string, stage_layers
from bridge.megatron.model import Gemma4Model
from bridge.megatron.multimodal import Gemma4MultimodalModel
from bridge.megatron.parallel import Parallel, check_groups
from bridge.megatron.pipeline import Boundary

# What Megatron's selective recompute can name and this model's layers honour.
RECOMPUTE_MODULES = ("core_attn", "mlp", "moe")


@dataclass
class Gemma4Provider:
    """Builds the stages of one model in one layout.

    `attention_backends` names the backend of sliding and of global layers (see `attention_backends`); "auto" picks.
    `overrides` go to the TransformerConfig as they are (recompute, dispatcher, communication overlap ...). `frozen`
    names towers and projectors that are not trained (`MODULES`). `layer_spec` and `fp8`: what the
    decoder's linears are, and what they multiply in; `fp8_experts`: whether experts multiply in FP8 (see `parts.py`);
    `fake_quant`: what their weights are rounded to in the forward pass (see `fake_quant.py`).
    Raises ParallelError where the layout does not fit the geometry, before anything is built.
    """

    geometry: Geometry
    parallel: Parallel = field(default_factory=Parallel)
    dtype: torch.dtype = torch.bfloat16
    attention_backends: dict[str, str] = field(default_factory=lambda: {"sliding": "auto", "global": "auto"})
    overrides: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    layer_spec: str = layer_options.LOCAL
    fp8: str = "none"
    fp8_experts: bool = False
    fake_quant: str = "none"

    def __post_init__(self) -> None:
        check_layout(self.geometry, self.parallel)
        layer_options.check_layer_spec(self.layer_spec, self.fp8, self.dtype)
        if self.fp8_experts:
            layer_options.check_fp8_experts(self.geometry, self.parallel, str(self.dtype).removeprefix("torch."))
            layer_options.check_fp8_gpu()
        check_fake_quant(self.geometry, self.parallel, self.fake_quant, self.layer_spec, self.fp8_experts)
        for kind, backend in self.attention_backends.items():
            if kind not in ("sliding", "global") or backend not in layer_options.ATTENTION:
                known = ", ".join(layer_options.ATTENTION)
                raise UsageError(f"attention backend {kind}={backend}: known are {known}, for sliding and global")
        for part in set(self.frozen) - set(MODULES):
            raise UsageError(f"{part} cannot be frozen; known are {', '.join(MODULES)}")
        unknown = set(self.overrides.get("recompute_modules") or ()) - set(RECOMPUTE_MODULES)
        if unknown:
            raise UsageError(f"recompute_modules {sorted(unknown)}: known are {', '.join(RECOMPUTE_MODULES)}")

    @cached_property
    def stages(self) -> list[range]:
        """Layers of each pipeline stage; stage number vp_stage * pp + pp_rank."""
        return stage_layers(self.geometry.num_layers, self.parallel.pp * self.parallel.vpp)

    @cached_property
    def config(self) -> Gemma4TransformerConfig:
        """Megatron's config of the whole model."""
        geometry, parallel = self.geometry, self.parallel
        published = self.overrides.get("published_kv", ())
        boundaries = [
            Boundary.before(geometry, stage.start, parallel.tp, parallel.sequence_parallel, published)
            for stage in self.stages[1:]
        ]
        first = geometry.layers[0]
        fields: dict[str, Any] = {
            "geometry": geometry,
            "pipeline_payload": max((boundary.slots for boundary in boundaries), default=1),
            "attention_backends": tuple(({"sliding": "auto", "global": "auto"} | self.attention_backends).items()),
            "layer_spec": self.layer_spec,
            "fp8_experts": self.fp8_experts,
            "fake_quant": self.fake_quant,
            **layer_options.FP8[self.fp8],
            "num_layers": geometry.num_layers,
            "hidden_size": geometry.hidden_size,
            "num_attention_heads": first.num_attention_heads,
            "num_query_groups": first.num_query_groups,
            "kv_channels": first.head_dim,
            "ffn_hidden_size": first.ffn_hidden_size,
            "normalization": "RMSNorm",
            "layernorm_epsilon": geometry.rms_norm_eps,
            "qk_layernorm": True,
            "softmax_scale": 1.0,
            "gated_linear_unit": True,
            "activation_func": gelu_tanh,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "init_method_std": geometry.initializer_range,
            "params_dtype": self.dtype,
            "pipeline_dtype": self.dtype,
            "bf16": self.dtype is torch.bfloat16,
            "fp16": self.dtype is torch.float16,
            "tensor_model_parallel_size": parallel.tp,
            "pipeline_model_parallel_size": parallel.pp,
            "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
            "expert_model_parallel_size": parallel.ep,
            "expert_tensor_parallel_size": parallel.etp,
            "context_parallel_size": parallel.cp,
            "sequence_parallel": parallel.sequence_parallel,
            # The mean over real tokens, not a mean of means; under CP and packing nothing else is right.
            "calculate_per_token_loss": True,
            # Fusions that need Apex, TE or a GPU compiler; the ones that pay are this project's own.
            "gradient_accumulation_fusion": False,
            "masked_softmax_fusion": False,
            "bias_dropout_fusion": False,
            "persist_layer_norm": False,
        }
        return Gemma4TransformerConfig(**(fields | self._pipeline | self._experts | self.overrides))

    @property
    def _pipeline(self) -> dict[str, Any]:
        """What Megatron's config says of stages, where there are several."""
        if self.parallel.pp == 1:
            return {}
        # With two interleaved stages, unoverlapped batched p2p delivers the wrong tensors in silence.
        overlap = self.parallel.vpp > 1
        return {
            "pipeline_model_parallel_layout": layout_string(self.stages),
            "overlap_p2p_comm": overlap,
            "batch_p2p_comm": not overlap,
        }

    @property
    def _experts(self) -> dict[str, Any]:
        """What Megatron's config says of experts, where there are some."""
        moe = self.geometry.moe
        if moe is None:
            return {}
        return {
            "num_moe_experts": moe.num_experts,
            "moe_router_topk": moe.topk,
            "moe_ffn_hidden_size": moe.ffn_hidden_size,
            "moe_router_load_balancing_type": "none",
            "moe_router_pre_softmax": False,
            "moe_token_dispatcher_type": "alltoall",
        }

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> Gemma4Model:
        """The model chunk of this rank and `vp_stage`; `pre_process` and `post_process` default to what its place says.

        Megatron's groups must be initialised. Raises ParallelError where they are not of this provider's layout.
        """
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        check_groups(self.parallel, groups, self.geometry.moe is not None)
        stage = (vp_stage or 0) * self.parallel.pp + get_pg_rank(groups.pp)
        if pre_process is None:
            pre_process = is_pp_first_stage(groups.pp) and not vp_stage
        if post_process is None:
            post_process = is_pp_last_stage(groups.pp) and (vp_stage or 0) == self.parallel.vpp - 1
        model_class = Gemma4MultimodalModel if self.geometry.multimodal else Gemma4Model
        if self.geometry.drafter is not None:
            model_class = Gemma4Drafter
        model = model_class(
            self.config,
            self.stages[stage],
            pre_process,
            post_process,
            groups,
            vp_stage if self.parallel.vpp > 1 else None,
        )
        if isinstance(model, Gemma4MultimodalModel):
            model.freeze(self.frozen)
        return model

    def build(self, pg_collection: ProcessGroupCollection | None = None) -> list[Gemma4Model]:
        """All model chunks of this rank, in the order Megatron's schedules take them."""
        return [self.provide(vp_stage=vp_stage, pg_collection=pg_collection) for vp_stage in range(self.parallel.vpp)]
