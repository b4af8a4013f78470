"""What transformers computes: the oracle of logits and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridge.errors import VerificationError
from bridge.geometry import Geometry
from bridge.megatron.visibility import GENERATE
from bridge.verify.sample import VerificationSample

LOGITS = "logits"
GRADIENT = "gradient."
LOSS = "loss"


def compute_reference(
    folder: Path,
    sample: VerificationSample,
    dtype: torch.dtype,
    gradients: bool,
    out: Path,
    vision_mask: str = GENERATE,
) -> None:
    """Run the HF model of `folder` on a sample, eager attention and eager experts, and write what it gives to `out`.

    The file holds `logits` [b, s, vocab] and, when asked for, `loss` and `gradient.NAME` by on-disk names.
    `vision_mask`: whose masks (`bridge.megatron.visibility.check_vision_mask`).
    """
    geometry = Geometry.from_folder(folder)
    model = load_hf(folder, geometry, dtype)
    inputs = with_masks(model, sample.inputs()) if vision_mask == GENERATE else sample.inputs()
    with torch.set_grad_enabled(gradients):
        output = model(**inputs, use_cache=False)
    tensors: dict[str, Tensor] = {LOGITS: output.logits.detach().contiguous()}
    if gradients:
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), sample.labels.flatten())
        loss.backward()
        tensors[LOSS] = loss.detach()
        tensors |= {GRADIENT + name: gradient for name, gradient in _gradients_by_disk_name(model).items()}
    save_file(tensors, out)


def with_masks(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a model with image tokens, the masks among them that its class generates with in a static cache.

    `attention_mask` [b, s], 1 = real, becomes one [b, 1, s, s] for each kind of layer. As they are without
    `mm_token_type_ids`.
    """
    types, mask = inputs.get("mm_token_type_ids"), inputs["attention_mask"]
    if types is None:
        return dict(inputs)
    shapes = torch.empty((*mask.shape, 0), dtype=model.dtype)
    masks = model.create_masks_for_generate(
        config=model.config,
        inputs_embeds=shapes,
        attention_mask=mask,
        cache=None,
        position_ids=None,
        mm_token_type_ids=types,
    )
    return {**inputs, "attention_mask": masks}


def _gradients_by_disk_name(model: Any) -> dict[str, Tensor]:
    """Gradients under the names that `save_pretrained` would give their parameters; zeros where none arrived."""
    from transformers.core_model_loading import revert_weight_conversion

    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        for name, parameter in model.named_parameters()
    }
    return dict(revert_weight_conversion(model, gradients))


def load_hf(folder: Path, geometry: Geometry, dtype: torch.dtype) -> Any:
    """The transformers model of a folder, by the class that its config names. Raises VerificationError."""
    import transformers

    options: dict[str, Any] = {"experts_implementation": "eager"} if geometry.moe is not None else {}
    try:
        model, report = getattr(transformers, geometry.architecture).from_pretrained(
            folder, attn_implementation="eager", dtype=dtype, output_loading_info=True, local_files_only=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise VerificationError(f"{folder}: transformers cannot load it ({first_line})") from error
    # transformers only warns of missing tensors, and computes with random ones.
    missing = sorted(report["missing_keys"])
    if missing:
        raise VerificationError(f"{folder}: transformers misses {len(missing)} tensors, {missing[0]} first")
    return model


class Reference:
    """A file that `compute_reference` wrote, read tensor by tensor."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, framework="pt")
        self.names = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)
