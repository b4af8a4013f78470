"""Linears of the towers: parallel where heads and FFN divide by the ranks, else replicated; clipped where stored."""

from __future__ import annotations

import copy

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_pg_size
from torch import Tensor

from bridge.geometry import AudioGeometry, VisionGeometry
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.linear import ColumnLinear, ReplicatedLinear, RowLinear, Split
from bridge.megatron.norm import init_device


class TowerContext:
    """What every module of a tower is built from: its config, and the ranks that share its heads.

    A tower's sequence (patches, frames) is never split, whatever the decoder's is. Heads and FFN are split over the
    tensor-parallel ranks when both divide by their number; otherwise every rank holds and computes all of the tower.
    """

    def __init__(
        self,
        config: Gemma4TransformerConfig,
        tp_group: torch.distributed.ProcessGroup,
        tower: VisionGeometry | AudioGeometry | None = None,
    ) -> None:
        self.config = copy.copy(config)
        self.config.sequence_parallel = False
        self.tp_group = tp_group
        size = get_pg_size(tp_group)
        divides = tower is not None and tower.num_heads % size == 0 and tower.ffn_hidden_size % size == 0
        self.tp_size = size if divides else 1

    def split(self, how: Split) -> Split:
        return how if self.tp_size > 1 else None

    def shared(self, parameter: Tensor) -> Tensor:
        """A replicated parameter that meets only this rank's heads: its gradient is summed over the ranks."""
        if self.tp_size == 1:
            return parameter
        return copy_to_tensor_model_parallel_region(parameter, group=self.tp_group)


class TowerModule(MegatronModule):
    """A module of a tower; Megatron's sharded state dict finds the parallel linears in it."""

    def __init__(self, context: TowerContext) -> None:
        super().__init__(context.config)
        self.context = context
        self.tp_group = context.tp_group


class Layers(TowerModule):
    """Modules in order, named by their numbers (a ModuleList would be saved as if nothing in it were parallel)."""

    def __init__(self, context: TowerContext, layers: list[TowerModule]) -> None:
        super().__init__(context)
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)


class TowerLinear(TowerModule):
    """A linear without bias, split as `split` says, its input and output clamped to stored bounds where `clipped`.

    Mathematics: transformers `Gemma4ClippableLinear`. The bounds are buffers [1] in the dtype of the model, as after
    `from_pretrained`; weights meet them between the parallel communication and the arithmetic, so that they act on the
    same numbers on any number of ranks.
    """

    def __init__(self, context: TowerContext, in_features: int, out_features: int, split: Split, clipped: bool) -> None:
        super().__init__(context)
        config = context.config
        split = context.split(split)
        self.linear: torch.nn.Module
        if split is None:
            self.linear = ReplicatedLinear(config, in_features, out_features)
        elif split == "column":
            self.linear = ColumnLinear(
                in_features,
                out_features,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                tp_group=context.tp_group,
            )
        else:
            self.linear = RowLinear(
                in_features,
                out_features,
                config=config,
                init_method=config.output_layer_init_method,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=context.tp_group,
            )
        self.clipped = clipped
        if clipped:
            for name, bound in (("min", -float("inf")), ("max", float("inf"))):
                for side in ("input", "output"):
                    tensor = torch.full((1,), bound, dtype=config.params_dtype, device=init_device(config))
                    self.register_buffer(f"{side}_{name}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in_features (/tp)] -> [n, out_features (/tp)]."""
        if self.clipped:
            x = torch.clamp(x, self.input_min, self.input_max)
        output = self.linear(x)
        # Megatron's parallel linears return a bias as well.
        x = output[0] if isinstance(output, tuple) else output
        if self.clipped:
            x = torch.clamp(x, self.output_min, self.output_max)
        return x
