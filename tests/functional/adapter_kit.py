"""Adapters of toys, as PEFT itself makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from bridge.geometry import Geometry
from bridge.verify.reference import LOGITS, load_hf, with_masks
from bridge.verify.sample import VerificationSample

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# PEFT's options by variant, where tests need no others.
OPTIONS: dict[str, dict[str, Any]] = {
    "12b": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"k_proj": 2},
        "modules_to_save": ["embed_tokens", "embed_vision"],
        "ensure_weight_tying": True,
    },
    "26b-a4b": {"target_modules": "all-linear", "target_parameters": list(EXPERTS), "use_rslora": True},
}


def load_model(folder: Path) -> Any:
    """The transformers model of a folder, in float32."""
    return load_hf(folder, Geometry.from_folder(folder), torch.float32).eval()


def make_adapter(folder: Path, target: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Save an adapter of the model in `folder` with random A and B, and all else near what it was; PEFT's model."""
    options = {"r": 4, "lora_alpha": 6, **options}
    model = peft.get_peft_model(load_model(folder), peft.LoraConfig(**options), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or ".modules_to_save." in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                factor = "lora_" in name and "magnitude" not in name
                parameter.copy_(noise if factor else parameter * (1 + noise))
    if dtype != torch.float32:
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    model.save_pretrained(target)
    return model


def peft_logits(folder: Path, adapter: Path, sample: VerificationSample, out: Path) -> Path:
    """The logits of PEFT with an adapter, as a reference that `bridge.verify` compares with."""
    model = peft.PeftModel.from_pretrained(load_model(folder), adapter, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        logits = model(**with_masks(model, sample.inputs()), use_cache=False).logits
    save_file({LOGITS: logits.contiguous()}, out)
    return out


def save_run(folder: Path, output: Path, parallel: dict[str, Any], lora: dict[str, Any]) -> None:
    """On every rank: the checkpoint of a LoRA run of everything, with values that do not depend on the layout.

    `lora`: what it has instead.
    """
    saved_run(folder, output, parallel, lora)


def saved_run(folder: Path, output: Path, parallel: dict[str, Any], lora: dict[str, Any]) -> Any:
    """What `save_run` saves, live."""
    from bridge.lora.inject import fill
    from bridge.lora.table import AdapterTable
    from recipes.config import resolve
    from recipes.train.checkpoint import RunProgress, prepare_output
    from recipes.train.optimizer_state import make_states
    from recipes.train.saver import Saver
    from recipes.train.setup import assemble, start_ranks
    from tests.functional.lora_kit import moved_values, whole_spec

    spec = whole_spec(Geometry.from_folder(folder), rank_pattern={}, alpha_pattern={})
    said = {
        "output": str(output),
        "model": {"hf": str(folder), "dtype": "float32"},
        "parallel": parallel,
        "train": {"steps": 1, "global_batch_size": 2},
        "lora": {"rank": spec.rank, "alpha": spec.alpha, "parameters": list(spec.parameters), **lora},
    }
    start_ranks()
    run = assemble(resolve(said), 1, load=True)
    assert isinstance(run.table, AdapterTable)
    fill(run.models, run.table, moved_values(3, folder))
    run.optimizer.reload_model_params()
    make_states(run.optimizer)
    prepare_output(run)
    Saver(run, lambda said: None).save(RunProgress(step=7))
    return run
