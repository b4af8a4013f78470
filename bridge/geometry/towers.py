"""What turns images, video and audio into soft tokens, read once from the tower sections of a config.

Defaults are those of transformers (`configuration_gemma4.py`, `configuration_gemma4_unified.py`): a saved config may
leave out what equals them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from bridge.errors import GeometryError
from bridge.geometry.fields import Fields, positive, rotary, short

# Of soft tokens, in the order of their numbers in `mm_token_type_ids`, where 0 is text.
SOFT_TOKEN_KINDS = ("image", "video", "audio")
# Of the top level of a multimodal config: sections of towers, and placeholders.
TOP_DEFAULTS = {
    "vision_config": None,
    "audio_config": None,
    "image_token_id": 258_880,
    "video_token_id": 258_884,
    "audio_token_id": 258_881,
}
_COLOURS = 3

_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 100.0,
    "pooling_kernel_size": 3,
    "patch_size": 16,
    "position_embedding_size": 10_240,
    "use_clipped_linears": False,
    "standardize": False,
}
_AUDIO_DEFAULTS: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "hidden_act": "silu",
    "subsampling_conv_channels": [128, 32],
    "conv_kernel_size": 5,
    "residual_weight": 0.5,
    "attention_chunk_size": 12,
    "attention_context_left": 13,
    "attention_context_right": 0,
    "attention_logit_cap": 50.0,
    "attention_invalid_logits_value": -1e9,
    "use_clipped_linears": True,
    "rms_norm_eps": 1e-6,
    "gradient_clipping": 1e10,
    "output_proj_dims": 1536,
}
_UNIFIED_VISION_DEFAULTS: dict[str, Any] = {
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "model_patch_size": None,
    "mm_embed_dim": 3840,
    "mm_posemb_size": 1120,
    "rms_norm_eps": 1e-6,
    "output_proj_dims": 3840,
}
_UNIFIED_AUDIO_DEFAULTS: dict[str, Any] = {"audio_embed_dim": 640, "rms_norm_eps": 1e-6}
# Properties of transformers' class that set `audio_embed_dim`.
_UNIFIED_AUDIO_ALIASES = dict.fromkeys(
    ("hidden_size", "output_proj_dims", "audio_samples_per_token"), "audio_embed_dim"
)
# In published configs: what a processor does, or of the decoder. No tower reads them.
_IGNORED = ("default_output_length", "num_soft_tokens", "global_head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class Placeholders:
    """Ids of the tokens that soft tokens replace; None where the config has no such token."""

    image: int | None
    video: int | None
    audio: int | None

    @property
    def by_kind(self) -> dict[str, int]:
        """Those that there are."""
        return {kind: token for kind in SOFT_TOKEN_KINDS if (token := getattr(self, kind)) is not None}

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(self.by_kind.values())


@dataclass(frozen=True)
class VisionGeometry:
    """The vision tower: an encoder over patches, pooled `kernel` x `kernel` to soft tokens of `output_size`."""

    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    patch_size: int
    kernel: int
    position_embedding_size: int
    rope_theta: float
    rms_norm_eps: float
    clipped: bool
    standardize: bool

    @property
    def patch_values(self) -> int:
        """Values of one patch: rows, columns, colours."""
        return _COLOURS * self.patch_size**2

    @property
    def output_size(self) -> int:
        return self.hidden_size

    @property
    def q_size(self) -> int:
        """Rows of each of q_proj, k_proj and v_proj."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class UnifiedVisionGeometry:
    """The encoder-free front of the 12B: one soft token of `output_size` from each patch of patch_size² pixels."""

    patch_size: int
    position_embedding_size: int
    output_size: int
    rms_norm_eps: float

    @property
    def patch_values(self) -> int:
        return _COLOURS * self.patch_size**2

    @property
    def kernel(self) -> int:
        """Nothing is pooled: the processor has merged the patches."""
        return 1


@dataclass(frozen=True)
class AudioGeometry:
    """The audio tower: two strided convolutions, then a conformer in which a frame sees `window` frames, its own last.

    `channels` are those of the convolutions; the first is also the number of mel bins.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    channels: tuple[int, int]
    conv_kernel: int
    window: int
    logit_cap: float
    residual_weight: float
    activation_limit: float
    clipped: bool
    rms_norm_eps: float
    output_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_hidden_size(self) -> int:
        return 4 * self.hidden_size

    @property
    def conv_values(self) -> int:
        """Values that the convolutions leave of one frame: two strides of 2 along the mel bins, second channels."""
        return self.channels[0] // 4 * self.channels[1]

    @property
    def features(self) -> int:
        """Values of one input frame: the mel bins."""
        return self.channels[0]


@dataclass(frozen=True)
class UnifiedAudioGeometry:
    """The 12B's audio: one soft token from each run of `output_size` raw samples."""

    output_size: int
    rms_norm_eps: float

    @property
    def features(self) -> int:
        return self.output_size


Vision = VisionGeometry | UnifiedVisionGeometry
Audio = AudioGeometry | UnifiedAudioGeometry


@dataclass(frozen=True, kw_only=True)
class Towers:
    """What a model has of each modality; None where it takes none."""

    vision: Vision | None = None
    audio: Audio | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of those that the model takes."""
        return tuple(name for name in TOWERS if getattr(self, name) is not None)


TOWERS = tuple(field.name for field in dataclasses.fields(Towers))


def read_towers(top: Fields, unified: bool, notices: list[str]) -> Towers:
    """The sections of a multimodal config. Raises GeometryError that names the field."""
    return Towers(
        vision=_read_vision(top["vision_config"], unified, notices),
        audio=_read_audio(top["audio_config"], unified, notices),
    )


def read_placeholders(fields: Fields) -> Placeholders:
    """The placeholder ids of a multimodal config. Raises GeometryError for what is no token id, or is used twice."""
    found: dict[str, int | None] = {}
    for kind in SOFT_TOKEN_KINDS:
        value = fields.token(f"{kind}_token_id")
        if value is not None and value in found.values():
            raise GeometryError(f"{kind}_token_id is {value}, which is another placeholder's id as well")
        found[kind] = value
    return Placeholders(**found)


def _read_vision(section: Any, unified: bool, notices: list[str]) -> Vision | None:
    """The vision section of a config, None where it has none. Raises GeometryError that names the field."""
    if section is None:
        return None
    defaults = _UNIFIED_VISION_DEFAULTS if unified else _VISION_DEFAULTS
    fields = Fields("vision_config", section, defaults, notices, ignored=_IGNORED)
    if unified:
        width = fields.positive("mm_embed_dim")
        fields.must("output_proj_dims", width, "the width of mm_embed_dim")
        patch_size = fields.positive("patch_size") * fields.positive("pooling_kernel_size")
        fields.must("model_patch_size", patch_size, "patch_size times pooling_kernel_size")
        return UnifiedVisionGeometry(
            patch_size=patch_size,
            position_embedding_size=fields.positive("mm_posemb_size"),
            output_size=width,
            rms_norm_eps=fields.number("rms_norm_eps"),
        )
    heads, head_dim = fields.positive("num_attention_heads"), fields.positive("head_dim")
    fields.must("num_key_value_heads", heads, "as many as num_attention_heads")
    fields.must("hidden_activation", "gelu_pytorch_tanh")
    fields.must("attention_bias", False)
    fields.must("attention_dropout", 0.0)
    if head_dim % 4:
        raise GeometryError(f"vision_config.head_dim is {head_dim}: rotary pairs along x and y need a multiple of 4")
    kernel = fields.positive("pooling_kernel_size")
    if kernel == 1:
        # transformers skips the pooler then, and with it the step that drops padding.
        raise GeometryError("vision_config.pooling_kernel_size is 1, which is not supported")
    return VisionGeometry(
        hidden_size=fields.positive("hidden_size"),
        ffn_hidden_size=fields.positive("intermediate_size"),
        num_layers=fields.positive("num_hidden_layers"),
        num_heads=heads,
        head_dim=head_dim,
        patch_size=fields.positive("patch_size"),
        kernel=kernel,
        position_embedding_size=fields.positive("position_embedding_size"),
        rope_theta=_axial_theta(fields),
        rms_norm_eps=fields.number("rms_norm_eps"),
        clipped=fields.flag("use_clipped_linears"),
        standardize=fields.flag("standardize"),
    )


def _read_audio(section: Any, unified: bool, notices: list[str]) -> Audio | None:
    """The audio section of a config, None where it has none. Raises GeometryError that names the field."""
    if section is None:
        return None
    defaults, aliases = (_UNIFIED_AUDIO_DEFAULTS, _UNIFIED_AUDIO_ALIASES) if unified else (_AUDIO_DEFAULTS, None)
    fields = Fields("audio_config", section, defaults, notices, aliases=aliases, ignored=_IGNORED)
    if unified:
        return UnifiedAudioGeometry(fields.positive("audio_embed_dim"), fields.number("rms_norm_eps"))
    hidden_size, heads = fields.positive("hidden_size"), fields.positive("num_attention_heads")
    if hidden_size % heads or hidden_size % 2:
        raise GeometryError(f"audio_config.hidden_size {hidden_size} does not divide into {heads} heads and two halves")
    window = fields.positive("attention_context_left") - 1
    fields.must("attention_chunk_size", window, "attention_context_left - 1")
    fields.must("attention_context_right", 0)
    fields.must("hidden_act", "silu")
    fields.must("attention_invalid_logits_value", -1e9)
    channels = fields["subsampling_conv_channels"]
    if not isinstance(channels, list | tuple) or len(channels) != 2:
        raise GeometryError(f"audio_config.subsampling_conv_channels is {short(channels)}, expected two numbers")
    first, second = (positive(value, "audio_config.subsampling_conv_channels") for value in channels)
    if first % 4:
        raise GeometryError(f"audio_config.subsampling_conv_channels starts with {first}, no multiple of 4")
    return AudioGeometry(
        hidden_size=hidden_size,
        num_layers=fields.positive("num_hidden_layers"),
        num_heads=heads,
        channels=(first, second),
        conv_kernel=fields.positive("conv_kernel_size"),
        window=window,
        logit_cap=fields.number("attention_logit_cap"),
        residual_weight=fields.number("residual_weight"),
        activation_limit=fields.number("gradient_clipping"),
        clipped=fields.flag("use_clipped_linears"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        output_size=fields.positive("output_proj_dims"),
    )


def _axial_theta(fields: Fields) -> float:
    """Of the old name `rope_scaling` before `rope_parameters`; the tower knows no other type than axial.

    What says `default`, or no type, is axial as well, as configs were first published.
    """
    key = "rope_scaling" if fields["rope_scaling"] else "rope_parameters"
    parameters = fields[key] if fields[key] is not None else {}
    rope_type, theta, _ = rotary(parameters, fields.where(key), (), {"rope_theta": fields["rope_theta"]})
    if rope_type not in ("default", "axial"):
        raise GeometryError(f"{fields.where(key)} {short(parameters)} is not supported (rope_type 'axial')")
    return theta
