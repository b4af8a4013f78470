"""What transformers computes: the oracle of logits and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridge.errors import VerificationError
from bridge.geometry import Geometry
from bridge.verify.sample import Sample

LOGITS = "logits"
GRADIENT = "gradient."
LOSS = "loss"


def compute_reference(folder: Path, sample: Sample, dtype: torch.dtype, gradients: bool, out: Path) -> None:
    """Run the HF model of `folder` on a sample, eager attention and eager experts, and write what it gives to `out`.

    The file holds `logits` [b, s, vocab] and, when asked for, `loss` and `gradient.NAME` by on-disk names.
    """
    geometry = Geometry.from_folder(folder)
    model = load_hf(folder, geometry, dtype)
    inputs = {"input_ids": sample.input_ids, "attention_mask": sample.attention_mask}
    with torch.set_grad_enabled(gradients):
        output = model(**inputs, **sample.features(), use_cache=False)
    tensors: dict[str, Tensor] = {LOGITS: output.logits.detach().contiguous()}
    if gradients:
        loss = torch.nn.functional.cross_entropy(output.logits.float().flatten(0, 1), sample.labels.flatten())
        loss.backward()
        tensors[LOSS] = loss.detach()
        tensors |= {GRADIENT + name: gradient for name, gradient in _gradients_by_disk_name(model).items()}
    save_file(tensors, out)


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
