"""The linears of the model: Megatron's own, and a replicated one, each with a place for an adapter of its weight.

`adapters` is an empty ModuleDict until `bridge.lora.inject` puts something in, under the name of the parameter that is
adapted. An adapter takes what the linear takes and gives, and returns what the adapted linear gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size
from torch import Tensor

from bridge.megatron.norm import init_device
from bridge.megatron.sharding import fill_up

Split = Literal["column", "row"] | None


class ColumnLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear, and its adapter."""

    split: Split = "column"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = torch.nn.ModuleDict()
        self.single_rank = _is_single_rank(self)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        if self.single_rank and not args and not kwargs:
            return adapted(self, input_, torch.nn.functional.linear(input_, self.multiplied()), None), None
        output, bias = super().forward(input_, *args, **kwargs)
        return adapted(self, input_, output, self.bias), bias

    def multiplied(self) -> Tensor:
        """The weight as the product sees it."""
        return self.weight


class RowLinear(RowParallelLinear):
    """Megatron's row-parallel linear, and its adapter."""

    split: Split = "row"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapters = torch.nn.ModuleDict()
        self.single_rank = _is_single_rank(self)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.single_rank:
            return adapted(self, input_, torch.nn.functional.linear(input_, self.multiplied()), None), None
        output, bias = super().forward(input_)
        return adapted(self, input_, output, self.bias), bias

    def multiplied(self) -> Tensor:
        """The weight as the product sees it."""
        return self.weight


class ReplicatedLinear(torch.nn.Linear):
    """A linear whose weight every tensor-parallel rank holds; gradients as of `RMSNorm`."""

    split: Split = None

    def __init__(self, config: TransformerConfig, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias, device=init_device(config), dtype=config.params_dtype)
        if config.perform_initialization:
            super().reset_parameters()
            if config.init_method is not None:
                config.init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.adapters = torch.nn.ModuleDict()

    def reset_parameters(self) -> None:
        """Nothing, where torch would fill it: a model whose weights are read has no values before."""

    def forward(self, input: Tensor) -> Tensor:
        return adapted(self, input, super().forward(input), self.bias)


def _is_single_rank(linear: ColumnParallelLinear | RowParallelLinear) -> bool:
    """Whether Megatron's linear is torch's: one rank holds all of it, and there is nothing to fuse or to send.

    Megatron's own way through it is a layer of Python and two autograd functions in it, forward and backward, for every
    product of a step: more than a small product takes.
    """
    config = linear.config
    special = config.gradient_accumulation_fusion or config.cpu_offloading or linear.gtp_remat_size > 1
    return get_pg_size(linear.tp_group) == 1 and linear.bias is None and not special


def adapted(linear: Any, x: Tensor, output: Tensor, bias: Tensor | None) -> Tensor:
    """`output` of a linear with a place for adapters for `x`, as its adapter changes it, where it has one."""
    if "weight" not in linear.adapters:
        return output
    changed: Tensor = linear.adapters["weight"](x, output, linear.weight, bias)
    return changed


def adapter_items(model: torch.nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The sharded tensors of all adapters of a model, out of those of the weights that they adapt.

    `state` is the model's sharded state dict. Each parameter of an adapter has its weight's axes but one, which the
    adapter names (`MISSING_AXIS`): a factor has the rank in its place, magnitudes have nothing there. Along the
    others it is cut as the weight is. Ranks that differ in the axis that fell away hold replicas.
    """
    held = {id(item.data): (name, item) for name, item in state.items() if hasattr(item, "data")}
    found: dict[str, Any] = {}
    for module in model.modules():
        for weight, adapter in getattr(module, "adapters", {}).items():
            name, item = held[id(getattr(module, weight))]
            place = name.removesuffix(weight) + f"adapters.{weight}."
            key = item.key.removesuffix(".weight")
            for part, parameter in adapter.named_parameters():
                found[place + part] = _derived(item, parameter, f"{key}.{part}", adapter.MISSING_AXIS[part])
    return found


def _derived(
    item: ShardedTensor | ShardedTensorFactory, parameter: Tensor, key: str, missing_axis: int
) -> ShardedTensor | ShardedTensorFactory:
    """`parameter`, cut as `item` is along all axes but `missing_axis`; without padding, where the item is."""
    boxes = item.build() if isinstance(item, ShardedTensorFactory) else [item]
    dims = len(boxes[0].global_shape)
    missing_axis %= dims
    gone = parameter.dim() < dims
    rank = 1 if gone else parameter.shape[missing_axis]
    kept_axes = [axis for axis in range(dims) if axis != missing_axis]
    main, *rest = item.replica_id
    # All zeros is the main replica: a place further down the axis that is not there makes another.
    replica_id = (main, rest[0] + boxes[0].global_offset[missing_axis], *rest[1:])

    def axes(whole: Sequence[int], size: int) -> tuple[int, ...]:
        full = tuple(size if axis == missing_axis else value for axis, value in enumerate(whole))
        return tuple(full[axis] for axis in kept_axes) if gone else full

    def sharded(key: str, part: Tensor, box: ShardedTensor, replica_id: ReplicaId) -> ShardedTensor:
        shape = axes(box.local_shape, rank)
        if tuple(part.shape) != shape:  # padding; elsewhere the parameter itself, which has a gradient beside it
            part = part[tuple(slice(size) for size in shape)]
        return ShardedTensor(
            key,
            part,
            part.dtype,
            tuple(part.shape),
            axes(box.global_shape, rank),
            axes(box.global_offset, 0),
            None if box.axis_fragmentations is None else axes(box.axis_fragmentations, 1),
            replica_id,
        )

    differ = [axis for axis in kept_axes if len({box.global_offset[axis] for box in boxes}) > 1]
    if not differ and tuple(parameter.shape) == axes(boxes[0].local_shape, rank):
        return sharded(key, parameter, boxes[0], replica_id)
    axis = differ[0] if differ else kept_axes[0]
    dim = axis - (gone and missing_axis < axis)
    sizes = [box.local_shape[axis] for box in boxes] if differ else [parameter.shape[dim]]

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
        parts = zip(tensor.split(sizes, dim=dim), boxes if differ else boxes[:1], strict=True)
        return [sharded(key, part, box, replica_id) for part, box in parts]

    @torch.no_grad()
    def merge(parts: Sequence[Tensor]) -> Tensor:
        shapes = ((*parameter.shape[:dim], size, *parameter.shape[dim + 1 :]) for size in sizes)
        return torch.cat([fill_up(part, shape) for part, shape in zip(parts, shapes, strict=True)], dim=dim)

    return ShardedTensorFactory(key, parameter, build, merge, replica_id)
