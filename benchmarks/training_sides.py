"""A training step of ours and one of transformers (and PEFT, and liger-kernel), on the same weights and batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_model import RandomModel, random_batches
from bridge.errors import UsageError

# Short rows go through in turn until there are so many tokens, so that one update serves as many of them everywhere.
TOKENS_A_STEP = 16_384
LR, CLIP = 1e-5, 1.0
# What is kept for the backward pass, fullest first.
RECOMPUTE = ("none", "selective", "full")
# The decoder's linears by their names in the multimodal classes and in the text classes.
TARGETS = r"model\.(language_model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# One step: the mean loss before its update.
Step = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """One measurement. `side`: ours, transformers or liger; `size` as of `RandomModel`.

    `mode`: sft, lora, or loss: there the side says whether the head takes a gradient. `recompute`: of ours; auto: as
    little as fits. `kernels`: of ours; torch: without this project's own.
    """

    variant: str
    mode: str
    length: int
    side: str = "ours"
    media: bool = False
    layer_spec: str = "local"
    fp8: str = "none"
    fp8_experts: bool = False
    recompute: str = "auto"
    kernels: str = "auto"
    size: str = "published"
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """`lora/12b/8192/ours`."""
        usual = ("local", "none", "auto")
        fp8_experts = "fp8 experts" if self.fp8_experts else "none"
        options = (self.layer_spec, self.fp8, fp8_experts, self.recompute, self.kernels)
        side = "+".join([self.side, *(x for x in options if x not in usual)])
        return "/".join([self.mode, self.variant + ("+media" if self.media else ""), str(self.length), side])

    @property
    def microbatches(self) -> int:
        return max(1, TOKENS_A_STEP // self.length) if self.size == "published" else 1

    @property
    def model(self) -> RandomModel:
        return RandomModel(self.variant, getattr(torch, self.dtype), self.size, text_only=not self.media)

    @property
    def lora(self) -> bool:
        return self.mode == "lora"

    def batches(self) -> Iterator[dict[str, Tensor]]:
        return random_batches(self.model.geometry, self.length, self.media)

    def flops(self) -> float:
        """That a step has to do, whoever does it."""
        from bridge.megatron.multimodal import SENSES
        from recipes.train.workload import training_flops

        batches = list(islice(self.batches(), self.microbatches))
        return training_flops(self.model.geometry, batches, SENSES if self.lora else (), self.lora)


def recipe_of(case: Case) -> Any:
    """The recipe of the same name, on one GPU, for the case's rows."""
    from recipes.config import ParallelConfig, load_recipe

    recipe = load_recipe(f"{case.mode}/{case.variant}", ["output=unused"])
    recipe.model.dtype, recipe.model.layer_spec, recipe.model.fp8 = case.dtype, case.layer_spec, case.fp8
    recipe.model.kernels = case.kernels
    recipe.model.fp8_experts = case.fp8_experts
    # Attention keeps little; what an FFN and experts keep is worth their products.
    recipe.parallel = ParallelConfig(recompute=case.recompute, recompute_modules=["mlp", "moe"])
    recipe.train.seq_length = case.length
    recipe.train.global_batch_size, recipe.train.micro_batch_size = case.microbatches, 1
    recipe.optimizer.lr, recipe.optimizer.min_lr, recipe.optimizer.warmup = LR, 0.0, 0
    # Full E4B has 143 GB of weights, gradients and optimizer otherwise; that optimizer is Transformer Engine's.
    aware = case.mode == "sft" and importlib.util.find_spec("transformer_engine") is not None
    recipe.optimizer.precision_aware, recipe.optimizer.moments_dtype = aware, "bfloat16" if aware else "float32"
    recipe.optimizer.schedule, recipe.optimizer.clip, recipe.optimizer.weight_decay = "constant", CLIP, 0.0
    if case.lora:
        recipe.lora.targets = TARGETS
    return recipe


def ours(case: Case) -> Step:
    """The training loop's own step: data to the device, schedule, reductions, clipping, update, counts."""
    from recipes.check import check_recipe
    from recipes.train import loop
    from recipes.train.checkpoint import Progress
    from recipes.train.data import Streams
    from recipes.train.setup import assemble, start_ranks
    from recipes.train.signals import StopSignal

    recipe = recipe_of(case)
    start_ranks()
    run = assemble(recipe, check_recipe(recipe, 1), load=True, bridge=case.model.bridge())
    one = loop._Loop(run, Streams(_Stream(case.batches())), Progress(), None, StopSignal())
    return lambda: one._step()[0]


class _Stream:
    """Batches as the loop takes them."""

    def __init__(self, batches: Iterator[dict[str, Tensor]]) -> None:
        self._batches = batches

    def __next__(self) -> dict[str, Tensor]:
        return next(self._batches)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def transformers_side(case: Case) -> Step:
    """What a short script does: sdpa, gradient checkpointing, AdamW on the model's own dtype (no float32 copy).

    With PEFT for LoRA, as it comes: adapters are float32. `side` liger: with the kernels that liger-kernel has for the
    model, its loss among them. Raises UsageError where it has none.
    """
    return transformers_step(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def transformers_step(case: Case, device: torch.device, attention: str = "sdpa", loss: bool = True) -> Step:
    """`transformers_side` on `device`. `attention`: an implementation that transformers knows. `loss`: or, to count
    without it, the sum of the last hidden states in its place."""
    model = case.model.transformers_model(
        device, attn_implementation={"text_config": attention} if case.model.geometry.audio is not None else attention
    )
    if case.side == "liger":
        _apply_liger(model)
    if case.lora:
        model = _with_peft(case, model)
    model.train()
    # Without a gradient of the embeddings nothing recomputed would have one.
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type != "cpu")
    batches = case.batches()

    def step() -> float:
        total = torch.zeros((), device=device)
        for _ in range(case.microbatches):
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
            labels = batch.pop("labels")
            if loss:
                mean = model(**batch, labels=labels, shift_labels=labels, use_cache=False).loss / case.microbatches
            else:
                whole = model.get_base_model() if case.lora else model
                mean = whole.model(**batch, use_cache=False).last_hidden_state.sum()
            mean.backward()
            total += mean.detach()
            del mean
        with torch.profiler.record_function("optimizer"):
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
            optimizer.zero_grad()
        return total.item()

    return step


def _apply_liger(model: Any) -> None:
    from liger_kernel.transformers import monkey_patch

    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UsageError(f"liger-kernel has nothing for {kind}")
    monkey_patch._apply_liger_kernel_to_instance(model=model)


def _with_peft(case: Case, model: Any) -> Any:
    import peft

    config = recipe_of(case).lora
    options: dict[str, Any] = {"target_parameters": list(config.parameters)} if config.parameters else {}
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=TARGETS, **options)
    return peft.get_peft_model(model, lora)


SIDES: dict[str, Callable[[Case], Step]] = {
    "ours": ours,
    "transformers": transformers_side,
    "liger": transformers_side,
}


def available(case: Case) -> str | None:
    """Why a case cannot be run here, or None."""
    needed = {"liger": "liger_kernel"}.get(case.side) or ("transformer_engine" if case.layer_spec == "te" else None)
    if needed is not None and importlib.util.find_spec(needed) is None:
        return f"{needed} is not installed"
    return None
