"""What a Gemma 4 takes beside text, a description each; what treats all modalities alike walks this table.

A modality has a section of the config (`bridge.geometry.towers`), modules that make soft tokens of media
(`bridge.megatron.towers`), and a place where the model calls them (`bridge.megatron.multimodal`). Without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bridge.flops import audio_flops, vision_flops
from bridge.geometry import Geometry
from bridge.mapping.audio import AUDIO, audio_dimensions
from bridge.mapping.table import Row
from bridge.mapping.vision import VISION, vision_dimensions

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Modality:
    """`features`: of each kind of soft tokens its tensors of a batch, named as the HF processors do, the media
    first. `modules`: of the model's first stage, the projector last. `dimensions`: the sizes that `rows` speak of.
    `flops` of a forward pass over the media of a batch. `requests` of `bridge.verify.media`: rows of a batch with all.
    """

    features: Mapping[str, tuple[str, ...]]
    modules: tuple[str, ...]
    rows: tuple[Row, ...]
    dimensions: Callable[[Geometry], dict[str, int]]
    flops: Callable[[Geometry, Batch], int]
    requests: tuple[str, ...]

    @property
    def fronts(self) -> tuple[str, ...]:
        """The modules before the projector: of an encoder-free modality there may be none."""
        return self.modules[:-1]

    @property
    def given_by(self) -> tuple[str, ...]:
        """The tensors that hold media."""
        return tuple(names[0] for names in self.features.values())


def _vision_flops(geometry: Geometry, batch: Batch) -> int:
    positions = [batch[name] for name in ("image_position_ids", "video_position_ids") if name in batch]
    return sum(vision_flops(geometry, (each != -1).all(-1).sum(-1).tolist()) for each in positions)


def _audio_flops(geometry: Geometry, batch: Batch) -> int:
    mask = batch.get("input_features_mask")
    return 0 if mask is None else audio_flops(geometry, mask.sum(-1).tolist())


# By the field of `Geometry` that says how a model takes it; its name is in those of its modules.
MODALITIES = {
    "vision": Modality(
        features={
            "image": ("pixel_values", "image_position_ids"),
            "video": ("pixel_values_videos", "video_position_ids", "num_frames_per_video"),
        },
        modules=("vision_tower", "vision_embedder", "embed_vision"),
        rows=VISION,
        dimensions=vision_dimensions,
        flops=_vision_flops,
        requests=("image", "two images", "two videos"),
    ),
    "audio": Modality(
        features={"audio": ("input_features", "input_features_mask")},
        modules=("audio_tower", "embed_audio"),
        rows=AUDIO,
        dimensions=audio_dimensions,
        flops=_audio_flops,
        requests=("audio",),
    ),
}
# All of their modules; what can be frozen by name.
MODULES = tuple(name for modality in MODALITIES.values() for name in modality.modules)
