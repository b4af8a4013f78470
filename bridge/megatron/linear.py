"""The linears of the model: Megatron's own, and a replicated one, each with a place for an adapter of its weight.

`adapters` is an empty ModuleDict until `bridge.lora.inject` puts something in, under the name of the parameter that is
adapted. An adapter takes what the linear takes and returns what is added to its output.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bridge.megatron.norm import init_device

Split = Literal["column", "row"] | None


class ColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear, and its adapter."""

    split: Split = "column"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = torch.nn.ModuleDict()

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_, *args, **kwargs)
        return adapted(self, input_, output), bias


class RowLinear(RowParallelLinear):
    """Megatron's row-parallel linear, and its adapter."""

    split: Split = "row"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = torch.nn.ModuleDict()

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return adapted(self, input_, output), bias


class ReplicatedLinear(torch.nn.Linear):
    """A linear whose weight every tensor-parallel rank holds; gradients as of `RMSNorm`."""

    split: Split = None

    def __init__(self, config: TransformerConfig, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias, device=init_device(config), dtype=config.params_dtype)
        if config.perform_initialization and config.init_method is not None:
            config.init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.adapters = torch.nn.ModuleDict()

    def forward(self, input: Tensor) -> Tensor:
        return adapted(self, input, super().forward(input))


def adapted(linear: torch.nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """`output` of a linear for `x`, and what its adapter adds, where it has one."""
    return output + linear.adapters["weight"](x) if "weight" in linear.adapters else output  # type: ignore


def adapter_items(model: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The sharded tensors of all adapters of a model, out of those of the weights that they adapt.

    `state` is the model's sharded state dict. A `lora_A` has its weight's axes with the rank in the place of the rows
    (the last but one), a `lora_B` has it in the place of the columns (the last); along the others both are cut as the
    weight is. Ranks that differ in the axis that fell away hold replicas.
    """
    held = {id(item.data): (name, item) for name, item in state.items() if hasattr(item, "data")}
    found: dict[str, Any] = {}
    for module in model.modules():
        for weight, adapter in getattr(module, "adapters", {}).items():
            name, item = held[id(getattr(module, weight))]
            place = name.removesuffix(weight) + f"adapters.{weight}."
            key = item.key.removesuffix(".weight")
            for part, lost in (("lora_A", -2), ("lora_B", -1)):
                found[place + part] = _derived(item, getattr(adapter, part), f"{key}.{part}", lost)
    return found


def _derived(
    item: ShardedTensor | ShardedTensorFactory, parameter: Tensor, key: str, lost: int
) -> ShardedTensor | ShardedTensorFactory:
    """`parameter`, cut as `item` is along all axes but `lost`."""
    boxes = item.build() if isinstance(item, ShardedTensorFactory) else [item]
    lost %= parameter.dim()
    kept = [axis for axis in range(parameter.dim()) if axis != lost]
    main, *rest = item.replica_id
    # All zeros is the main replica: a place further down the axis that is not there makes another.
    replica_id = (main, rest[0] + boxes[0].global_offset[lost], *rest[1:])
    if len({tuple(box.global_offset[axis] for axis in kept) for box in boxes}) > 1:
        return ShardedTensorFactory(key, parameter, item.build_fn, item.merge_fn, replica_id)

    def axes(whole: tuple[int, ...], rank: int) -> tuple[int, ...]:
        return tuple(rank if axis == lost else size for axis, size in enumerate(whole))

    (box, *_) = boxes
    return ShardedTensor(
        key,
        parameter,
        parameter.dtype,
        tuple(parameter.shape),
        axes(box.global_shape, parameter.shape[lost]),
        axes(box.global_offset, 0),
        axes(box.axis_fragmentations, 1),
        replica_id,
    )
