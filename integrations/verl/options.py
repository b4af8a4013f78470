"""What verl's configuration asks for, as this bridge says it; what is not followed is refused by its key."""

from __future__ import annotations

from typing import Any

import torch

from bridge.errors import UsageError
from bridge.lora.spec import LoraSpec
from bridge.megatron.parallel import Parallel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def layout(engine: Any) -> Parallel:
    """The layout of a `McoreEngineConfig`. Raises UsageError, and what `Parallel` raises."""
    if engine.context_parallel_size > 1 or engine.dynamic_context_parallel:
        raise UsageError("context_parallel_size > 1: verl's losses see whole rows here; not supported")
    tp = engine.tensor_model_parallel_size
    # As Megatron does where verl says nothing.
    etp = tp if engine.expert_tensor_parallel_size is None else engine.expert_tensor_parallel_size
    return Parallel(
        tp=tp,
        pp=engine.pipeline_model_parallel_size,
        vpp=engine.virtual_pipeline_model_parallel_size or 1,
        ep=engine.expert_model_parallel_size,
        etp=etp,
        sequence_parallel=engine.sequence_parallel and tp > 1,
    )


def check(engine: Any, model: Any) -> None:
    """Raise UsageError for what the engine would have to leave out in silence."""
    refused = {
        "model_type=value_model": model.model_type == "value_model",
        "mtp.enable": bool(model.mtp.enable),
        "qat.enable": bool(getattr(engine.qat, "enable", False)),
        "router_replay": engine.router_replay.mode != "disabled",
        "vanilla_mbridge": engine.vanilla_mbridge,
        "use_megatron_fsdp": engine.use_megatron_fsdp,
        "use_dist_checkpointing": engine.use_dist_checkpointing,
        "use_remove_padding=False": not engine.use_remove_padding,
        "pad_to_length": engine.pad_to_length,
    }
    for name, asked in refused.items():
        if asked:
            raise UsageError(f"{name}: not supported by the gemma4_bridge engine of verl")


# verl names Megatron's modules, which are fused: these are theirs in the decoder, by transformers' names.
_MODULES = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}
# What verl's shipped configuration sets of a LoRA that asks for nothing else.
_USUAL: tuple[object, ...] = (None, [], False, "", "xavier", "zero", "pre")


def lora_spec(model: Any) -> LoraSpec | None:
    """The adapters of `model.lora`. `target_modules`: Megatron's modules of the decoder, as verl names them, or what
    `LoraSpec.targets` takes; `target_parameters`, of experts, as PEFT's. Raises UsageError."""
    lora = model.lora or {}
    if not lora.get("rank", 0):
        return None
    known = {"rank", "alpha", "dropout", "target_modules", "target_parameters", "merge", "type"}
    frozen = {name for name, value in lora.items() if name.startswith("freeze_") and value is True}
    unknown = sorted(name for name, value in lora.items() if name not in known | frozen and value not in _USUAL)
    if unknown or lora.get("type", "lora") != "lora":
        raise UsageError(f"model.lora: {', '.join(unknown) or lora['type']} is not supported")
    named = lora.get("target_modules") or list(_MODULES)
    targets: str | tuple[str, ...] = named if isinstance(named, str) else tuple(named)
    if not isinstance(targets, str) and set(targets) <= _MODULES.keys():
        listed = "|".join(name for target in targets for name in _MODULES[target])
        targets = rf"(?!.*_tower\.).*layers\.\d+\.(?:self_attn|mlp)\.(?:{listed})"
    return LoraSpec(
        rank=int(lora["rank"]),
        alpha=float(lora.get("alpha", 32)),
        targets=targets,
        dropout=float(lora.get("dropout", 0.0)),
        parameters=tuple(lora.get("target_parameters") or ()),
    )
