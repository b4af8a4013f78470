"""A training step of ours and one of transformers (and PEFT, and liger-kernel), on the same weights and batches."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case
from bridge.errors import UsageError

LR, CLIP = 1e-5, 1.0
# The decoder's linears by their names in the multimodal classes and in the text classes.
TARGETS = r"model\.(language_model\.)?layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# One step: the mean loss before its update.
Step = Callable[[], float]


def recipe_of(case: Case) -> Any:
    """The recipe of the same name, on one GPU, for the case's rows."""
    from recipes.config import ParallelConfig, load_recipe

    recipe = load_recipe(f"{case.mode}/{case.variant}", ["output=unused"])
    recipe.model.dtype, recipe.model.layer_spec, recipe.model.fp8 = case.dtype, case.layer_spec, case.fp8
    recipe.model.kernels = case.kernels
    recipe.model.fp8_experts = case.fp8_experts
    recipe.model.attention_backends = {"sliding": "auto", "global": case.attention}
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
    from recipes.train.checkpoint import RunProgress
    from recipes.train.data import Streams
    from recipes.train.setup import assemble, start_ranks
    from recipes.train.signals import StopSignal

    recipe = recipe_of(case)
    start_ranks()
    run = assemble(recipe, check_recipe(recipe, 1), load=True, bridge=case.model.bridge())
    one = loop._Loop(run, Streams(_Stream(case.batches())), RunProgress(), None, StopSignal())
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
    """Put its classes and functions in the place of transformers', in this model and, for good, in this process."""
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


def step_of(case: Case) -> Step:
    """Build the case's side. Raises UsageError in a process that liger-kernel has changed for another side than its."""
    if case.side != "liger" and changed_by_liger():
        raise UsageError(
            f"{case.name}: liger-kernel has replaced classes of transformers in this process; start another"
        )
    return SIDES[case.side](case)


def changed_by_liger() -> bool:
    """Whether a class of transformers' Gemma 4 is liger-kernel's in this process."""
    module = sys.modules.get("transformers.models.gemma4.modeling_gemma4")
    parts = () if module is None else (module.Gemma4RMSNorm, module.Gemma4TextMLP)
    return any(part.__module__.startswith("liger_kernel") for part in parts)
