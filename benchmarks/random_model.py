"""A model of random weights on both sides, in memory: no file is written, and nothing is read but a config.

The numbers are those of `gemma4-bridge toy`: every tensor repeats a block that depends on the variant, the seed and its
name. Ours is filled through the bridge, as from a folder; transformers' is built where it runs and filled in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge import Gemma4Bridge
from bridge.geometry import AudioGeometry, Geometry
from bridge.hf.tensors import TensorSpec
from bridge.mapping import table_for
from bridge.toy.config import ToyConfig, published, shallow, shrink
from bridge.toy.weights import block
from bridge.toy.write import build
from bridge.verify.sample import IGNORE

_STORED = {torch.bfloat16: "BF16", torch.float32: "F32"}
# Ids below are special tokens.
_FIRST_ORDINARY_ID = 8
SIZES = ("published", "shallow", "toy")


@dataclass(frozen=True)
class RandomModel:
    """One model. `size`: published, shallow (real widths, few layers) or toy."""

    variant: str
    dtype: torch.dtype = torch.bfloat16
    size: str = "published"
    text_only: bool = True
    seed: int = 0

    @cached_property
    def _config(self) -> ToyConfig:
        whole = shallow(self.variant) if self.size == "shallow" else published(self.variant)
        return ToyConfig(shrink(whole, self.variant) if self.size == "toy" else whole, self.text_only, untied=False)

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.from_dict(self._config.written)

    @cached_property
    def _config_and_shapes(self) -> tuple[Any, dict[str, tuple[int, ...]]]:
        return build(self._config, str(self.dtype).removeprefix("torch."), dead_kv=False)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """What a folder of this model would hold, by name."""
        _, shapes = self._config_and_shapes
        return {name: TensorSpec(name, _STORED[self.dtype], shape) for name, shape in shapes.items()}

    def block(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """What a tensor repeats, flat: see `bridge.toy.weights.block`."""
        return block(name, shape, _STORED[self.dtype], self.variant, self.seed)

    def bridge(self) -> Gemma4Bridge:
        """To build ours of."""
        return RandomBridge(self.geometry, table_for(self.geometry), model=self)

    def transformers_model(self, device: torch.device, **options: Any) -> Any:
        """The model of transformers, on `device`; on "meta" without values. `options`: of attention and experts."""
        import transformers
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.initialization import no_init_weights

        config, shapes = self._config_and_shapes
        with torch.device(device), no_init_weights():
            model = getattr(transformers, self.geometry.architecture)._from_config(config, dtype=self.dtype, **options)
        model.tie_weights()
        if device.type == "meta":
            return model
        state = model.state_dict()
        held = {tensor.data_ptr() for tensor in state.values()}
        for name, tensor in revert_weight_conversion(model, state).items():
            if name in shapes:
                if tensor.data_ptr() not in held:
                    raise RuntimeError(f"{name} is a copy of what the model holds")
                self._fill(tensor, name)
        return model

    def _fill(self, tensor: Tensor, name: str) -> None:
        values = _block_on(self, tensor.device, name, tuple(tensor.shape))
        flat = tensor.detach().view(-1)
        whole = len(flat) // len(values) * len(values)
        flat[:whole].view(-1, len(values)).copy_(values)
        flat[whole:].copy_(values[: len(flat) - whole])


class _Rows:
    """The tensors of a random model, made where they are wanted: a `bridge.convert.live.TensorSource`."""

    def __init__(self, model: RandomModel, device: torch.device) -> None:
        self.tensors = model.tensors
        # Parts of a tensor are asked for one after the other.
        self._block = lru_cache(maxsize=2)(partial(_block_on, model, device))

    def tensor_rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `TensorSource`."""
        shape = self.tensors[name].shape
        block = self._block(name, shape)
        # A scalar is one row.
        width = math.prod(shape[1:])
        first, count = start * width % len(block), (stop - start) * width
        copies = -(-(first + count) // len(block))
        return block.repeat(copies)[first : first + count].view(stop - start, *shape[1:])


def _block_on(model: RandomModel, device: torch.device, name: str, shape: tuple[int, ...]) -> Tensor:
    """What a tensor of the model repeats, flat, on a device."""
    return torch.from_numpy(model.block(name, shape)).view(model.dtype).to(device)


@dataclass(frozen=True)
class RandomBridge(Gemma4Bridge):
    """A bridge whose weights are made, not read."""

    model: RandomModel | None = None

    def load_hf_weights(self, model: Sequence[torch.nn.Module]) -> None:
        """See `Gemma4Bridge.load_hf_weights`."""
        from bridge.convert.live import load_from_hf

        assert self.model is not None
        device = next(model[0].parameters()).device
        load_from_hf(model, self.table, _Rows(self.model, device))


def random_batches(geometry: Geometry, length: int, media: bool = False) -> Iterator[dict[str, Tensor]]:
    """Rows of random text [1, length] without padding, on the CPU; with `media`, also an image or more, and a clip."""
    allowed = torch.tensor(
        [i for i in range(_FIRST_ORDINARY_ID, geometry.vocab_size) if i not in geometry.placeholder_ids]
    )
    generator = torch.Generator().manual_seed(0)
    while True:
        ids = allowed[torch.randint(len(allowed), (length + 1,), generator=generator)]
        extra = _put_media(geometry, ids, generator) if media else {}
        labels = ids[1:].clone()
        labels[torch.isin(labels, torch.tensor(sorted(geometry.placeholder_ids)))] = IGNORE
        batch = {"input_ids": ids[None, :-1].clone(), "labels": labels[None]}
        if media:
            types = torch.zeros_like(batch["input_ids"])
            assert geometry.placeholders is not None
            for token, number in ((geometry.placeholders.image, 1), (geometry.placeholders.audio, 3)):
                types[batch["input_ids"] == token] = number
            batch["mm_token_type_ids"] = types
        yield batch | extra


# Soft tokens of an image: its sides, in squares that are pooled into one. The published budget is 280.
_IMAGE = (20, 14)
_CLIP_TOKENS = 100
# Of a row, one image for so many tokens.
_TEXT_FOR_AN_IMAGE = 1024


def _put_media(geometry: Geometry, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Overwrite runs of `ids` with placeholders, and make what they stand for, as the processors would."""
    vision, placeholders = geometry.vision, geometry.placeholders
    assert vision is not None and placeholders is not None and placeholders.image is not None
    columns, rows = _IMAGE
    while columns * vision.kernel > vision.position_embedding_size or columns * rows * 2 > len(ids):
        columns, rows = columns // 2, rows // 2
    soft, images = columns * rows, max(1, len(ids) // _TEXT_FOR_AN_IMAGE)
    spacing = len(ids) // images
    for image in range(images):
        ids[image * spacing + 2 : image * spacing + 2 + soft] = placeholders.image
    y, x = torch.meshgrid(torch.arange(rows * vision.kernel), torch.arange(columns * vision.kernel), indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], dim=-1).expand(images, -1, -1).contiguous()
    pixels = torch.rand(images, places.shape[1], vision.patch_values, generator=generator)
    found = {"pixel_values": pixels, "image_position_ids": places}
    audio, tokens = geometry.audio, min(_CLIP_TOKENS, spacing - soft - 8)
    if isinstance(audio, AudioGeometry) and tokens > 0 and placeholders.audio is not None:
        ids[soft + 4 : soft + 4 + tokens] = placeholders.audio
        features = torch.randn(1, 4 * tokens, audio.features, generator=generator)
        found |= {"input_features": features, "input_features_mask": torch.ones(1, 4 * tokens, dtype=torch.bool)}
    return found
