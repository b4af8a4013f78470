"""From a launcher's environment to ranks, and from a recipe to this rank's model and optimizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from bridge import Gemma4Bridge
from bridge.errors import UsageError
from bridge.geometry import producers
from bridge.lora.spec import LoraSpec
from bridge.mapping import Table
from bridge.megatron import cpu_runtime
from bridge.megatron.model import Gemma4Model
from bridge.megatron.parallel import initialize
from bridge.megatron.provider import Gemma4Provider
from recipes.check import check_recipe
from recipes.config import Recipe
from recipes.groups import FREEZABLE, compiled, none_named
from recipes.train import lora
from recipes.train.drafter import Drafting, with_drafter
from recipes.train.names import named_parameters
from recipes.train.rates import Schedule, group_overrides
from recipes.train.rendezvous import meet
from recipes.train.schedule import make_scheduler

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def start_ranks() -> None:
    """Join the ranks that torchrun or srun started, or be the only one. Without a GPU: on the CPU, over gloo.

    Nothing happens where torch.distributed is initialised already.
    """
    cpu_runtime.enable()
    if dist.is_initialized():
        return
    env, met = os.environ, meet()
    if met is not None and env["RANK"] == "0":
        print(met, file=sys.stderr, flush=True)
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_device(int(env.get("LOCAL_RANK", "0")), torch.cuda.device_count()))
    if "RANK" in env:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)


def local_device(rank: int, visible: int) -> int:
    """The GPU of the `rank`-th process of a node that sees so many. Raises UsageError."""
    if visible == 1:
        return 0  # a launcher may show each process its own alone (srun --gpus-per-task=1)
    if rank >= visible:
        raise UsageError(f"rank {rank} of this node has no GPU: {visible} are visible; start one process for each")
    return rank


@dataclass
class BuiltModel:
    """A model on this rank, and what its data and batches are. `chunks`: the models as schedules take them, in order,
    which is in DDP where they are trained. `drafting`: what trains a drafter in the last of them. `teacher`: the frozen
    model that is asked in each step."""

    recipe: Recipe
    groups: ProcessGroupCollection
    provider: Gemma4Provider
    models: list[Gemma4Model]
    chunks: Sequence[torch.nn.Module]
    drafting: Drafting | None = field(default=None, kw_only=True)
    teacher: BuiltModel | None = field(default=None, kw_only=True)

    @property
    def config(self) -> Any:
        """Megatron's TransformerConfig."""
        return self.provider.config

    def gather_weights(self) -> None:
        """Let every rank hold the weights of the last update: with overlap they come during the next forward pass."""
        if self.recipe.parallel.overlap:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]

    @property
    def drafts_alone(self) -> bool:
        """Whether a drafter is trained, and its model is not."""
        return self.drafting is not None and self.drafting.frozen

    @property
    def device(self) -> torch.device:
        return torch.device(torch.cuda.current_device())


@dataclass
class Run(BuiltModel):
    """What a training run consists of on this rank.

    `table`: of what is trained, and so of what checkpoints hold: the model's, or that of its adapters (`lora`), or its
    drafter's where the model is frozen. `bridge`: of the model that reads the data.
    """

    bridge: Gemma4Bridge
    optimizer: MegatronOptimizer
    scheduler: Schedule
    microbatches: int
    table: Table
    lora: LoraSpec | None = None

    @property
    def trained(self) -> Gemma4Bridge:
        """Of the model whose weights are trained, or adapted: a drafter's where only that is."""
        return self.drafting.bridge if self.drafting is not None and self.drafting.frozen else self.bridge

    @property
    def stored(self) -> list[Gemma4Model]:
        """What of this rank checkpoints hold: `table` is of them."""
        return self.drafting.held if self.drafting is not None and self.drafting.frozen else self.models


def build(recipe: Recipe, load: bool) -> Run:
    """Everything but the data, on every rank. `load`: the weights too (not when a checkpoint will bring them).

    Raises a BridgeError before anything is built where the recipe, the model and the ranks do not fit together.
    """
    start_ranks()
    return assemble(recipe, check_recipe(recipe, dist.get_world_size()), load)


def assemble(recipe: Recipe, microbatches: int, load: bool, bridge: Gemma4Bridge | None = None) -> Run:
    """`build` of a recipe that has been checked. `bridge`: in the place of what the recipe names, opened already."""
    if recipe.train.deterministic:
        only_deterministic()
    bridge = bridge or open_model(recipe)
    spec = lora.spec_of(recipe.lora)
    adapters = None if spec is None else lora.table_of(recipe.lora, spec, bridge)
    parallel, dtype = recipe.parallel, DTYPES[recipe.model.dtype]
    overrides: dict[str, Any] = {"perform_initialization": False, "kernels": recipe.model.kernels}
    overrides["vision_mask"] = recipe.model.vision_mask
    if parallel.recompute == "full":
        overrides |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute == "selective":
        overrides |= {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    if bridge.geometry.moe is not None:
        overrides["moe_token_dispatcher_type"] = parallel.dispatcher
        if recipe.train.aux_loss:
            overrides |= {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": recipe.train.aux_loss}
    elif recipe.train.aux_loss:
        raise UsageError(f"train.aux_loss={recipe.train.aux_loss:g} is for models with experts, and this one has none")
    if recipe.drafter.path is not None:
        overrides["published_kv"] = tuple(producers(bridge.geometry.layers).values())
    layout = parallel.layout()
    model = recipe.model
    parts = {key: getattr(model, key) for key in ("layer_spec", "fp8", "fp8_experts", "fake_quant")}
    backends = dict(model.attention_backends)
    provider = bridge.provider(layout, dtype, overrides=overrides, attention_backends=backends, **parts)
    groups = initialize(layout, seed=recipe.train.seed)
    models = provider.build(groups)
    if load or adapters is not None or (recipe.drafter.path is not None and recipe.drafter.target == "frozen"):
        bridge.load_hf_weights(models)
    if spec is not None and adapters is not None:
        lora.add_adapters(recipe, spec, adapters, models)
    freeze(models, recipe.model.freeze)
    drafting = None
    if recipe.drafter.path is not None:
        drafting = with_drafter(recipe, bridge, provider, models, groups, load)
    chunks = wrap(provider, models, groups, parallel.overlap)
    optimizer = make_optimizer(recipe, chunks, groups)
    scheduler = make_scheduler(recipe, optimizer)
    table = adapters or (drafting.bridge.table if drafting is not None and drafting.frozen else bridge.table)
    built = (recipe, groups, provider, models, chunks)
    return Run(*built, bridge, optimizer, scheduler, microbatches, table, spec, drafting=drafting)


def only_deterministic() -> None:
    """Let torch refuse, in this process from now on, what does not give the same bits every time."""
    # Torch looks for this at the first product of the process: what comes later is not seen.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)


def open_model(recipe: Recipe) -> Gemma4Bridge:
    """Geometry and tables of the recipe's model. Raises a BridgeError."""
    if recipe.model.hf is not None:
        return Gemma4Bridge.from_hf(recipe.model.hf)
    assert recipe.model.megatron is not None
    return Gemma4Bridge.from_megatron(recipe.model.megatron)


def freeze(models: Sequence[torch.nn.Module], groups: Sequence[str]) -> None:
    """Take the gradients of parameters that `model.freeze` names. Collective. Raises UsageError."""
    patterns = compiled("model.freeze", groups, FREEZABLE)
    hits = torch.zeros(len(patterns) + 1, dtype=torch.int64)
    for model in models:
        for name, parameter in named_parameters(model):
            matched = [bool(pattern.search(name)) for pattern in patterns]
            parameter.requires_grad_(parameter.requires_grad and not any(matched))
            hits += torch.tensor([*matched, parameter.requires_grad])
    # Another stage may hold what this one does not.
    hits = hits.to(torch.cuda.current_device())
    dist.all_reduce(hits)
    for group, count in zip(groups, hits.tolist(), strict=False):
        if not count:
            raise none_named("model.freeze", group, FREEZABLE)
    if not hits[-1]:
        raise UsageError(f"model.freeze={list(groups)}: nothing is left to train")


def wrap(
    provider: Gemma4Provider, models: Sequence[Gemma4Model], groups: ProcessGroupCollection, overlap: bool
) -> list[torch.nn.Module]:
    """Megatron's DDP around every chunk, and the hooks by which its schedules drive it."""
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    config = provider.config
    chunks = [
        DistributedDataParallel(config, ddp, model, disable_bucketing=i > 0, pg_collection=groups)
        for i, model in enumerate(models)
    ]
    config.every_gradient = overlap
    config.finalize_model_grads_func = finalize_model_grads
    hooks = {"no_sync_func": [chunk.no_sync for chunk in chunks]}
    if overlap:
        hooks["grad_sync_func"] = [chunk.start_grad_sync for chunk in chunks]
        hooks["param_sync_func"] = [chunk.start_param_sync for chunk in chunks]
    for name, functions in hooks.items():
        setattr(config, name, functions if len(functions) > 1 else functions[0])
    return chunks


def make_optimizer(
    recipe: Recipe, chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """Megatron's distributed Adam: each data-parallel rank holds its part of the float32 weights and moments."""
    wanted, dtype = recipe.optimizer, DTYPES[recipe.model.dtype]
    precision: dict[str, Any] = {}
    if wanted.precision_aware:
        moments = DTYPES[wanted.moments_dtype]
        precision = {"use_precision_aware_optimizer": True, "exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
    config = OptimizerConfig(
        optimizer="adam",
        lr=wanted.lr,
        min_lr=wanted.min_lr,
        weight_decay=wanted.weight_decay,
        adam_beta1=wanted.beta1,
        adam_beta2=wanted.beta2,
        adam_eps=wanted.eps,
        clip_grad=wanted.clip,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=recipe.parallel.overlap,
        **precision,
    )
    rates = group_overrides(recipe, config, chunks)
    optimizer = get_megatron_optimizer(config, list(chunks), rates, use_gloo_process_groups=False, pg_collection=groups)
    for part in optimizer.chained_optimizers:
        # Without Transformer Engine or Apex Megatron takes torch's Adam. Of its own accord that takes one parameter and
        # one operation at a time on a CPU; on a GPU it batches parameters, but makes a temporary copy of all second
        # moments (4 bytes a parameter) and moves 72 bytes a parameter, where 28 are needed.
        if isinstance(part.optimizer, torch.optim.Adam):
            for group in part.optimizer.param_groups:
                group["fused"] = True
    return optimizer
