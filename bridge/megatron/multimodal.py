"""The multimodal model: a Gemma 4 decoder whose first stage makes soft tokens and puts them where placeholders stand.

Mathematics: transformers `Gemma4Model.forward` and `Gemma4UnifiedModel.forward`. Unlike them, this refuses placeholders
without features, features without placeholders, and bidirectional models given vision without token types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridge.errors import UsageError
from bridge.geometry import AudioGeometry, Geometry, UnifiedVisionGeometry, VisionGeometry
from bridge.geometry.towers import SOFT_TOKEN_KINDS
from bridge.mapping.modalities import MODALITIES
from bridge.megatron.config import Gemma4TransformerConfig
from bridge.megatron.kv_cache import CachedStep
from bridge.megatron.model import Gemma4Model
from bridge.megatron.towers.audio import AudioTower, check_clips
from bridge.megatron.towers.linear import TowerContext
from bridge.megatron.towers.packing import Images
from bridge.megatron.towers.unified import Projector, UnifiedVisionEmbedder
from bridge.megatron.towers.vision import VisionTower
from bridge.megatron.visibility import Visibility, send
from bridge.megatron.zigzag import Zigzag

# Media that are read where towers are planned: on the host, unless they come on a device.
ON_HOST = frozenset({"image_position_ids", "video_position_ids", "num_frames_per_video", "input_features_mask"})


def count_placeholders(geometry: Geometry, input_ids: Tensor) -> dict[str, int]:
    """How many tokens of `input_ids` stand for each kind of soft token that the model knows; a text model knows none.

    The host waits for each of them where they are on a GPU.
    """
    if geometry.placeholders is None:
        return {}
    return {kind: int((input_ids == token).sum()) for kind, token in geometry.placeholders.by_kind.items()}


@dataclass(frozen=True)
class MediaTensors:
    """Images, frames and clips of one batch, as the Hugging Face processors give them; None where there are none.

    Pixels are [images, slots, values] with (x, y) positions [images, slots, 2] (-1 = padding), frames of all videos one
    after the other, `num_frames_per_video` [videos]; audio is [clips, t, values] with a mask [clips, t].
    """

    pixel_values: Tensor | None = None
    image_position_ids: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_position_ids: Tensor | None = None
    num_frames_per_video: Tensor | None = None
    input_features: Tensor | None = None
    input_features_mask: Tensor | None = None

    def __post_init__(self) -> None:
        features = (names for modality in MODALITIES.values() for names in modality.features.values())
        for given, needed in ((given, needed) for given, *others in features for needed in others):
            if (getattr(self, given) is None) != (getattr(self, needed) is None):
                missing = needed if getattr(self, needed) is None else given
                raise UsageError(f"{given} and {needed} come together, but there is no {missing}")
        if self.num_frames_per_video is not None and self.pixel_values_videos is not None:
            frames = int(torch.as_tensor(self.num_frames_per_video).sum())
            if frames != len(self.pixel_values_videos):
                raise UsageError(
                    f"num_frames_per_video counts {frames} frames, pixel_values_videos holds "
                    f"{len(self.pixel_values_videos)}"
                )


class Gemma4MultimodalModel(Gemma4Model):
    """One stage of a multimodal Gemma 4; the first holds the towers and projectors that its geometry has."""

    vision_tower: VisionTower
    vision_embedder: UnifiedVisionEmbedder
    embed_vision: Projector
    audio_tower: AudioTower
    embed_audio: Projector

    def __init__(
        self,
        config: Gemma4TransformerConfig,
        layers: range,
        pre_process: bool,
        post_process: bool,
        pg_collection: ProcessGroupCollection,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config, layers, pre_process, post_process, pg_collection, vp_stage)
        if not pre_process:
            return
        vision, audio = config.geometry.vision, config.geometry.audio
        tp = pg_collection.tp
        whole = TowerContext(config, tp)
        if isinstance(vision, VisionGeometry):
            self.vision_tower = VisionTower(TowerContext(config, tp, vision), vision)
        elif isinstance(vision, UnifiedVisionGeometry):
            self.vision_embedder = UnifiedVisionEmbedder(whole, vision)
        if vision is not None:
            self.embed_vision = Projector(whole, vision.output_size, vision.rms_norm_eps)
        if isinstance(audio, AudioGeometry):
            self.audio_tower = AudioTower(TowerContext(config, tp, audio), audio)
        if audio is not None:
            self.embed_audio = Projector(whole, audio.output_size, audio.rms_norm_eps)

    def freeze(self, parts: Sequence[str]) -> None:
        """Stop training these modules (of `MODULES`), as far as this stage holds them."""
        for name in parts:
            module = getattr(self, name, None)
            if module is not None:
                module.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        mm_token_type_ids: Tensor | None = None,
        z_loss: float = 0.0,
        visibility: Visibility | CachedStep | None = None,
        label_positions: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_position_ids: Tensor | None = None,
        num_frames_per_video: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        placeholder_counts: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`Gemma4Model.forward`, with images, frames and clips as `MediaTensors` describes them.

        `placeholder_counts`: those of `input_ids`, where the caller has them already, from the host.

        Features are used on the first stage only; `input_ids`, `mm_token_type_ids` and `attention_mask` [b, s] are
        wanted on every one. Raises UsageError for features and placeholders that do not fit.
        """
        text_ids = self.text_ids(input_ids)
        if self.pre_process and decoder_input is None:
            media = MediaTensors(
                pixel_values,
                image_position_ids,
                pixel_values_videos,
                video_position_ids,
                num_frames_per_video,
                input_features,
                input_features_mask,
            )
            seen = media.pixel_values is not None or media.pixel_values_videos is not None
            if seen and mm_token_type_ids is None and self.config.geometry.bidirectional_vision:
                raise UsageError("this model attends within images both ways: pass mm_token_type_ids with them")
            decoder_input = self.embed_with_media(input_ids, media, placeholder_counts)
        return super().forward(
            text_ids,
            position_ids,
            attention_mask,
            decoder_input,
            labels,
            packed_seq_params,
            mm_token_type_ids,
            z_loss,
            visibility,
            label_positions,
            **kwargs,
        )

    def soft_tokens(self, media: MediaTensors) -> dict[str, Tensor]:
        """Projected soft tokens [n, hidden] of each kind that `media` holds: "image", "video", "audio".

        Raises UsageError for a kind that the model does not take.
        """
        soft: dict[str, Tensor] = {}
        batches: dict[str, Images] = {}
        if media.pixel_values is not None and media.image_position_ids is not None:
            batches["image"] = Images("image", media.pixel_values, media.image_position_ids)
        if media.pixel_values_videos is not None and media.video_position_ids is not None:
            batches["video"] = Images("frame", media.pixel_values_videos, media.video_position_ids)
        if batches:
            soft |= self._vision_tokens(batches)
        if media.input_features is not None and media.input_features_mask is not None:
            soft["audio"] = self._audio_tokens(media.input_features, media.input_features_mask)
        return soft

    def _vision_tokens(self, batches: dict[str, Images]) -> dict[str, Tensor]:
        # Images and frames go through the tower together, which is quicker, and uses each parameter once: Megatron's
        # overlapped gradient reduction counts the uses of a step.
        vision = self.config.geometry.vision
        if vision is None:
            raise UsageError("images or video were given, but this model has no vision (vision_config)")
        front = self.vision_tower if isinstance(vision, VisionGeometry) else self.vision_embedder
        tokens = self.embed_vision(front(list(batches.values())))
        counts = [batch.num_patches // vision.kernel**2 for batch in batches.values()]
        return dict(zip(batches, tokens.split(counts), strict=True))

    def _audio_tokens(self, features: Tensor, mask: Tensor) -> Tensor:
        audio = self.config.geometry.audio
        if audio is None:
            raise UsageError("audio was given, but this model takes none (it has no audio_config)")
        if isinstance(audio, AudioGeometry):
            return self.embed_audio(self.audio_tower(features, mask))
        check_clips(features, mask, audio.features)
        real = send(mask.flatten().nonzero().squeeze(1), features.device)
        return self.embed_audio(features.flatten(0, 1).index_select(0, real).to(self.config.params_dtype))

    def text_ids(self, input_ids: Tensor) -> Tensor:
        """What everything but the merge sees: padding where placeholders stand. [b, s] -> [b, s]"""
        placeholders = self.config.geometry.placeholders
        assert placeholders is not None
        held = torch.zeros_like(input_ids, dtype=torch.bool)
        for token in placeholders.ids:
            held |= input_ids == token
        return input_ids.masked_fill(held, self.config.geometry.pad_token_id or 0)

    def embed_with_media(
        self, input_ids: Tensor, media: MediaTensors, counts: dict[str, int] | None = None, *, divided: bool = True
    ) -> Tensor:
        """Scaled input embeddings [s / cp (/tp), b, h] of `input_ids` [b, s], soft tokens where placeholders stand.

        On the first stage alone. `counts` as `placeholder_counts` of `forward`. Without `divided` [s (/tp), b, h], also
        under context parallelism. Raises UsageError as `forward` does.
        """
        soft = self.soft_tokens(media)
        text_ids, index = self.text_ids(input_ids), self._index(input_ids, soft, counts)
        if divided and self.pg_collection.cp.size() > 1:
            # Every rank runs the towers on all of the media and puts in what falls into its part of the rows.
            zigzag = Zigzag.of(input_ids.shape[1], self.pg_collection.cp)
            text_ids, index = zigzag.take(text_ids), zigzag.take(index)
        return self._merge(self.embed(text_ids), index, soft)

    def _merge(self, embeddings: Tensor, index: Tensor, soft: dict[str, Tensor]) -> Tensor:
        """Put soft tokens over the embeddings [s (/tp), b, h] of their placeholders, as `index` [b, s] says."""
        if soft:
            tokens = torch.cat(list(soft.values()))
            rows = index.t().contiguous()
            if self.config.sequence_parallel:
                # Each rank puts in the tokens of its part of the sequence: what they owe the towers is a sum.
                tp = self.pg_collection.tp
                tokens = copy_to_tensor_model_parallel_region(tokens, group=tp)
                rows = rows.chunk(get_pg_size(tp))[get_pg_rank(tp)]
            embeddings = ScatterSoftTokens.apply(embeddings, tokens.to(embeddings.dtype), rows)
        if not (torch.is_grad_enabled() and self.config.every_gradient):
            return embeddings
        return ZeroGradients.apply(embeddings, *self._unused(soft))

    def _index(self, input_ids: Tensor, soft: dict[str, Tensor], counts: dict[str, int] | None) -> Tensor:
        """Which soft token, counted through `soft`, each token of [b, s] becomes; -1 = none. Raises UsageError."""
        geometry = self.config.geometry
        assert geometry.placeholders is not None
        counts = count_placeholders(geometry, input_ids) if counts is None else counts
        index, start = torch.full_like(input_ids, -1), 0
        for kind in SOFT_TOKEN_KINDS:
            given, wanted = len(soft[kind]) if kind in soft else None, counts.get(kind, 0)
            if given is None and wanted:
                raise UsageError(f"input_ids hold {wanted} {kind} placeholders, but no {kind} features were given")
            if given is not None and given != wanted:
                raise UsageError(f"{given} {kind} soft tokens for {wanted} {kind} placeholders in input_ids")
            if given:
                place = input_ids == geometry.placeholders.by_kind[kind]
                number = place.flatten().cumsum(0).view_as(place) - 1 + start
                index = torch.where(place, number, index)
                start += given
        return index

    def media_parameters(self, modality: str) -> Iterator[Tensor]:
        """Trained parameters of the towers and projectors of a modality (`MODALITIES`), as far as on this stage."""
        for name in MODALITIES[modality].modules:
            module = getattr(self, name, None)
            if module is not None:
                yield from (parameter for parameter in module.parameters() if parameter.requires_grad)

    def _unused(self, soft: dict[str, Tensor]) -> Iterator[Tensor]:
        """Trained parameters of the towers and projectors that this batch did not use."""
        for name, modality in MODALITIES.items():
            if not modality.features.keys() & soft.keys():
                yield from self._media_parameters[name]

    @cached_property
    def _media_parameters(self) -> dict[str, list[Tensor]]:
        """As of the first forward pass with gradients since the model was last put into its mode."""
        return {modality: list(self.media_parameters(modality)) for modality in MODALITIES}

    def train(self, mode: bool = True) -> Gemma4MultimodalModel:
        """As of every module. What is trained may have changed: it is looked up again."""
        self.__dict__.pop("_media_parameters", None)
        super().train(mode)
        return self


class ScatterSoftTokens(torch.autograd.Function):
    """Row `rows` [s, b] of `tokens` [n, h] over `embeddings` [s, b, h], where it is not -1; a token comes once at most.

    So the gradient of the tokens is a gather. That of an indexed tensor is a sum over all places, text among them,
    which a GPU would add to one row, one after the other.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, tokens: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(tokens)
        merged = tokens.index_select(0, rows.flatten().clamp(min=0)).view_as(embeddings)
        return torch.where((rows >= 0)[..., None], merged, embeddings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), (rows,) = grads, ctx.saved_tensors
        d_embeddings = d_tokens = None
        if ctx.needs_input_grad[0]:
            d_embeddings = gradient.masked_fill((rows >= 0)[..., None], 0.0)
        if ctx.needs_input_grad[1]:
            # Where each token went; behind the last is room for those that are none.
            places = torch.full((ctx.count + 1,), -1, device=rows.device)
            flat = rows.flatten()
            places.scatter_(0, flat.where(flat >= 0, ctx.count), torch.arange(len(flat), device=rows.device))
            places = places[:-1]
            d_tokens = gradient.flatten(0, 1).index_select(0, places.clamp(min=0))
            d_tokens.masked_fill_((places < 0)[:, None], 0.0)  # on another rank
        return d_embeddings, d_tokens, None


class ZeroGradients(torch.autograd.Function):
    """Hand a tensor on, and zeros as gradients to parameters that had no part in it.

    Megatron's overlapped gradient reduction waits for every parameter of a bucket. A rank whose batch has no image must
    answer for the tower all the same, or its bucket never leaves.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = [(parameter.shape, parameter.dtype, parameter.device) for parameter in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.parameters)
        return gradient, *zeros
