"""A stock Megatron GPT model, trained with Megatron's own schedules on any layout. What ranks call lives here."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge.megatron.parallel import Parallel, initialize

VOCAB, SEQUENCE, MICROBATCHES, GLOBAL_BATCH, STEPS = 64, 16, 4, 16, 3


@dataclass(frozen=True)
class Case:
    """A layout and what else of Megatron's configuration it turns on."""

    parallel: Parallel = field(default_factory=Parallel)
    moe: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    bf16: bool = False
    world: int = 0  # 0: the smallest that carries the layout

    @property
    def world_size(self) -> int:
        return self.world or self.parallel.world_size

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


class Norm(torch.nn.LayerNorm):
    """Megatron's own norm without Transformer Engine refuses sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def config_of(case: Case) -> Any:
    """Megatron's own config of a small GPT."""
    from megatron.core.transformer import TransformerConfig

    parallel, dtype = case.parallel, case.dtype
    moe = {
        "num_moe_experts": 4,
        "moe_ffn_hidden_size": 48,
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": 32,
    }
    return TransformerConfig(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        ffn_hidden_size=64,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=case.bf16,
        # with two stages and interleaving, batched transfers deliver the wrong tensors, silently
        overlap_p2p_comm=parallel.vpp > 1,
        batch_p2p_comm=parallel.vpp == 1,
        calculate_per_token_loss=False,
        **(moe if case.moe else {}),
        **case.config,
    )


def chunks_of(case: Case, config: Any, groups: ProcessGroupCollection, device: torch.device) -> list[Any]:
    """The chunks of this rank, in Megatron's DDP."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    parallel = case.parallel
    ddp_config = DistributedDataParallelConfig(
        **({"use_distributed_optimizer": True, "grad_reduce_in_fp32": True, "bucket_size": 10_000} | case.ddp)
    )
    layer = get_gpt_layer_local_spec(num_experts=4 if case.moe else None)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    chunks = []
    for chunk in range(parallel.vpp):
        vp_stage = chunk if parallel.vpp > 1 else None
        count = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
        first, last = groups.pp.rank() == 0, groups.pp.rank() == parallel.pp - 1
        model = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=Norm),
            VOCAB,
            SEQUENCE,
            pre_process=first and chunk == 0,
            post_process=last and chunk == parallel.vpp - 1,
            share_embeddings_and_output_weights=True,
            position_embedding_type="rope",
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        model = model.to(device=device, dtype=case.dtype)
        fill_parameters(model)
        chunks.append(
            DistributedDataParallel(config, ddp_config, model, disable_bucketing=chunk > 0, pg_collection=groups)
        )
    return chunks


def optimizer_of(case: Case, chunks: list[Any], groups: ProcessGroupCollection) -> Any:
    """Megatron's Adam, and what its schedules ask of the config to reduce gradients."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config, ddp_config = chunks[0].config, chunks[0].ddp_config
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.01,
            bf16=case.bf16,
            params_dtype=case.dtype,
            use_distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        ),
        chunks,
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    if ddp_config.overlap_grad_reduce:
        config.grad_sync_func = chunks[0].start_grad_sync
        config.param_sync_func = chunks[0].start_param_sync
    return optimizer


def train(case: Case) -> list[tuple[float, float]]:
    """Train for some steps; the (loss, gradient norm) of each. Runs on every rank."""
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from bridge.megatron.moe import forget_graph

    parallel, device = case.parallel, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    groups = initialize(parallel)
    chunks = chunks_of(case, config_of(case), groups, device)
    optimizer = optimizer_of(case, chunks, groups)
    run = get_forward_backward_func()
    history = []
    for step in range(STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        iterators = [batches(step, groups.dp.rank(), groups.dp.size(), device) for _ in chunks]
        reports = run(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=MICROBATCHES,
            seq_length=SEQUENCE,
            micro_batch_size=GLOBAL_BATCH // MICROBATCHES // groups.dp.size(),
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        loss = torch.zeros(1, device=device)
        if reports:
            loss += torch.stack([report["loss"] for report in reports]).mean() / groups.dp.size()
        # the last stages hold the loss, each data-parallel replica a part, each tensor-parallel rank a copy
        dist.all_reduce(loss)
        history.append((loss.item() / parallel.tp, float(norm)))
    for dispatcher in (m.token_dispatcher for chunk in chunks for m in chunk.modules() if isinstance(m, MoELayer)):
        forget_graph(dispatcher)
    return history


def forward_step(iterator: Iterator[Any], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens, labels, positions, mask = next(iterator)

    def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = output.float().mean()
        return loss, {"loss": loss.detach().clone()}  # the schedule divides the loss in place

    return model(tokens, positions, mask, labels=labels), loss_of


def batches(step: int, rank: int, size: int, device: torch.device) -> Iterator[Any]:
    """The microbatches of a data-parallel rank: its rows of a global batch that depends on the step only."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (MICROBATCHES, GLOBAL_BATCH // MICROBATCHES, SEQUENCE + 1), generator=generator)
    mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), diagonal=1)[None, None].to(device)
    for batch in tokens:
        rows = batch.chunk(size)[rank].to(device)
        positions = torch.arange(SEQUENCE, device=device).expand(len(rows), -1)
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), positions, mask


def fill_parameters(model: torch.nn.Module) -> None:
    """Fill each parameter with its box of a global tensor that depends on the checkpoint key only."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    def walk(value: Any) -> Iterator[ShardedTensor]:
        if isinstance(value, ShardedTensorFactory):
            value = value.build()
        if isinstance(value, ShardedTensor):
            yield value
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)

    for shard in walk(model.sharded_state_dict()):
        generator = torch.Generator().manual_seed(zlib.crc32(shard.key.encode()))
        whole = torch.randn(shard.global_shape, generator=generator) * 0.1
        if "layernorm" in shard.key and shard.key.endswith("weight"):
            whole += 1
        box = tuple(
            slice(start, start + length) for start, length in zip(shard.global_offset, whole.shape, strict=True)
        )
        part = whole[box]
        for axis, length in enumerate((1,) * shard.prepend_axis_num + tuple(shard.local_shape)):
            part = part.narrow(axis, 0, length)
        with torch.no_grad():
            shard.data.copy_(part.reshape(shard.data.shape))
