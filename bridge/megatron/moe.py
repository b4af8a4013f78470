"""The mixture of experts of 26B-A4B on Megatron-Core's MoELayer.

Mathematics: transformers `Gemma4TextRouter` and `Gemma4TextExperts`.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import divide, get_pg_rank, get_pg_size
from torch import Tensor

from bridge.megatron import fp8_experts
from bridge.megatron.activation import geglu
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.fake_quant import Rounding
from bridge.megatron.kernels import fused
from bridge.megatron.local_dispatch import LocalDispatcher
from bridge.megatron.norm import RMSNorm, init_device, rms_norm
from bridge.megatron.sharding import split_parameter


class Gemma4Router(TopKRouter):
    """Norm without weight, x scale x hidden^-0.5, projection, softmax over the top k, x per-expert scale.

    `scale` [h] and `per_expert_scale` [E] stay parameters of their own beside `weight` [E, h]: folding one into another
    would round in bf16. Up to the logits everything is in the dtype of the model, as in transformers; softmax and after
    is float32. Top-k before softmax is the same as softmax, top-k, renormalise.
    """

    def __init__(self, config: Gemma4TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        # Megatron's router makes its weight on the CPU.
        device = init_device(config)
        self.weight.data = self.weight.data.to(device)
        self.scale = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype, device=device))
        self.per_expert_scale = torch.nn.Parameter(
            torch.ones(self.num_experts, dtype=config.params_dtype, device=device)
        )
        for parameter in (self.scale, self.per_expert_scale):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.adapters = torch.nn.ModuleDict()
        # Tokens of each expert [E] on this rank, in training, since it was last reset to None: for the log.
        self.load: Tensor | None = None

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, h], the raw residual -> logits [s, b, E]."""
        normed = rms_norm(input, None, self.config.layernorm_epsilon, kernels=self.config.kernels)
        normed = normed * self.scale * self.config.hidden_size**-0.5
        logits = torch.nn.functional.linear(normed, self.weight)
        return self.adapters["weight"](normed, logits, self.weight) if "weight" in self.adapters else logits

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities [s * b, E], zero where not routed, and the routing map."""
        probs, routing_map = super().routing(logits.float(), padding_mask)
        # Under recompute the forward pass runs twice, once of them without gradients.
        if self.training and torch.is_grad_enabled():
            counts = routing_map.sum(0)
            self.load = counts if self.load is None else self.load + counts
        return probs * self.per_expert_scale, routing_map


class GroupedExperts(MegatronModule):
    """All experts of a rank as two 3-D weights and two grouped matrix products.

    `linear_fc1` [E', 2I', h] is [gate; up] and `linear_fc2` [E', h, I'], with E' experts and I' of their width on this
    rank (EP, ETP). Under ETP the dispatcher gathers tokens and sums partial outputs.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Gemma4TransformerConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        assert config.moe_ffn_hidden_size is not None
        self.num_local_experts = num_local_experts
        self.pg_collection = pg_collection
        width = divide(config.moe_ffn_hidden_size, get_pg_size(pg_collection.expt_tp))
        self.linear_fc1 = self._weight(num_local_experts, 2 * width, config.hidden_size, partition_dim=1)
        self.linear_fc2 = self._weight(num_local_experts, config.hidden_size, width, partition_dim=2)
        self.adapters = torch.nn.ModuleDict()
        self.rounding = Rounding(config.fake_quant, {"linear_fc1": None, "linear_fc2": pg_collection.expt_tp})

    def _weight(self, *shape: int, partition_dim: int) -> torch.nn.Parameter:
        config = self.config
        weight = torch.nn.Parameter(torch.empty(*shape, dtype=config.params_dtype, device=init_device(config)))
        if config.perform_initialization and config.init_method is not None:
            config.init_method(weight)
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=1)
        # Gradients of experts are summed over the expert data-parallel group, not over all ranks.
        weight.allreduce = False  # type: ignore[attr-defined]
        return weight

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Tokens [t, h] sorted by expert, their counts [E'], and their probabilities [t]."""
        offsets = tokens_per_expert.to(device=tokens.device).cumsum(0).to(torch.int32)
        activation = geglu(self._product("linear_fc1", tokens, offsets), self.config.kernels)
        output = self._product("linear_fc2", activation, offsets)
        # The products round to the tokens' dtype; transformers multiplies by the float32 probability after fc2.
        return scale_rows(output, probs, self.config.kernels), None

    def _product(self, name: str, x: Tensor, offsets: Tensor) -> Tensor:
        """[t, in] @ each expert's weight, transposed: rows up to `offsets[e]` are of expert e or one before."""
        weight = self.rounding(name, getattr(self, name))
        if self.config.fp8_experts:
            output = fp8_experts.grouped_mm(x, weight, offsets, self.config.kernels)
        else:
            output = torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
        return output + self.adapters[name](x, offsets) if name in self.adapters else output

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Under the keys that Megatron's own expert modules use: a checkpoint moves between them unchanged."""
        groups = self.pg_collection
        ep = (0, get_pg_rank(groups.ep), get_pg_size(groups.ep))
        etp_rank, etp_size = get_pg_rank(groups.expt_tp), get_pg_size(groups.expt_tp)
        replica_id = (0, 0, get_pg_rank(groups.expt_dp))
        fc1, fc2 = (f"{prefix}experts.{name}.weight" for name in ("linear_fc1", "linear_fc2"))
        return {
            # Each rank has its part of the gates above its part of the ups.
            f"{prefix}linear_fc1": split_parameter(
                fc1, self.linear_fc1, 1, lambda i: (ep, (1, i * etp_size + etp_rank, 2 * etp_size)), 2, replica_id
            ),
            f"{prefix}linear_fc2": split_parameter(
                fc2, self.linear_fc2, 2, lambda i: (ep, (2, etp_rank, etp_size)), 1, replica_id
            ),
        }


def scale_rows(output: Tensor, probs: Tensor, kernels: str) -> Tensor:
    """Rows of experts [t, h] times their float32 probabilities [t], rounded once, to the dtype of `output`."""
    if fused(kernels, output):
        from bridge.megatron.kernels import scale_rows as triton

        return triton.scale_rows(output, probs)
    return (output * probs.unsqueeze(-1)).to(output.dtype)


def forget_graph(dispatcher: object) -> None:
    """Let go of what a dispatcher kept of a forward pass that is over, where it hangs on the graph of that pass.

    Megatron's dispatchers keep the router's probabilities. Their graph ends in the nodes that accumulate gradients, and
    hooks of these hold Megatron's DDP, which holds the model: a circle through nodes that Python's collector cannot
    see through, so that neither the model nor its process groups, with their threads, would ever be freed.
    """
    for name, value in list(vars(dispatcher).items()):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            setattr(dispatcher, name, None)


class Gemma4MoE(MoELayer):
    """Router and experts. Takes the raw residual: the router and the experts norm it each in its own way."""

    def __init__(
        self, config: Gemma4TransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection
    ) -> None:
        submodules = MoESubmodules(experts=GroupedExperts, router=Gemma4Router)
        super().__init__(config, submodules, layer_number, pg_collection)
        self.set_layer_number(layer_number)
        if get_pg_size(pg_collection.ep) == get_pg_size(pg_collection.expt_tp) == 1:
            self.token_dispatcher = LocalDispatcher(config, pg_collection)
        self.pre_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> tuple[Tensor, Tensor]:
        """Norm what goes to the experts, after the router has seen the residual."""
        return super().preprocess(self.pre_layernorm(hidden_states), probs, routing_map)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """The last step of a forward pass, with which the dispatcher is done."""
        output = super().postprocess(output, shared_expert_output)
        forget_graph(self.token_dispatcher)
        return output
