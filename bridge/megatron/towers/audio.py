"""The audio tower of E2B and E4B (transformers `Gemma4AudioModel`) on a packed sequence of real frames."""

from __future__ import annotations

import math

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.nn.functional import conv1d, glu, pad, relu, silu, softplus

from bridge.errors import UsageError
from bridge.geometry import AudioGeometry
from bridge.megatron.linear import ColumnLinear, ReplicatedLinear
from bridge.megatron.norm import RMSNorm, init_device
from bridge.megatron.towers.linear import Layers, TowerContext, TowerLinear, TowerModule
from bridge.megatron.visibility import send

# Of the norms that transformers builds without asking the config.
_NORM_EPS = 1e-6
_INVALID = -1e9


class AudioTower(TowerModule):
    """Mel frames -> soft tokens: two strided convolutions, conformer layers, a linear with bias."""

    def __init__(self, context: TowerContext, geometry: AudioGeometry) -> None:
        super().__init__(context)
        self.geometry = geometry
        self.subsample_conv_projection = ConvFront(context, geometry)
        self.layers = Layers(context, [ConformerLayer(context, geometry) for _ in range(geometry.num_layers)])
        self.output_proj = ReplicatedLinear(context.config, geometry.hidden_size, geometry.output_size, bias=True)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Log-mel frames [clips, t, bins] and mask [clips, t] (True = real) -> soft tokens [n, output_size].

        Raises UsageError for shapes that disagree, and for a clip whose real frames do not come first
        or that has none.
        """
        check_clips(features, mask, self.geometry.features)
        frames = self.subsample_conv_projection(features, send(mask, features.device))
        # What the two convolutions leave of each clip.
        real = mask.bool()[:, ::2][:, ::2]
        hidden = frames.flatten(0, 1).index_select(0, send(real.flatten().nonzero().squeeze(1), features.device))
        clip = send(real.nonzero()[:, 0], features.device)
        distances = relative_positions(self.geometry, hidden.dtype, hidden.device)
        recompute = self.config.recompute_granularity == "full" and self.training
        for layer in self.layers.children():

            def run(hidden: Tensor, clip: Tensor, distances: Tensor, layer: torch.nn.Module = layer) -> Tensor:
                return layer(hidden, clip, distances, len(mask))

            if recompute and hidden.requires_grad:
                hidden = tensor_parallel.checkpoint(run, False, hidden, clip, distances)
            else:
                hidden = run(hidden, clip, distances)
        return self.output_proj(hidden)


def check_clips(features: Tensor, mask: Tensor, width: int) -> None:
    """Raises UsageError where features and mask disagree, are of another width, or padded on the left or throughout."""
    if features.dim() != 3 or features.shape[-1] != width:
        raise UsageError(f"audio features have shape {list(features.shape)}, expected [clips, frames, {width}]")
    if features.shape[:2] != mask.shape:
        raise UsageError(f"audio features are {list(features.shape[:2])} frames, their mask {list(mask.shape)}")
    late = (mask[:, 1:].bool() & ~mask[:, :-1].bool()).any(dim=1).nonzero()
    if len(late):
        raise UsageError(f"audio clip {int(late[0]) + 1} of {len(mask)} is padded before real frames; pad it behind")
    empty = (~mask.bool().any(dim=1)).nonzero()
    if len(empty):
        raise UsageError(f"audio clip {int(empty[0]) + 1} of {len(mask)} has no real frames, only padding")


class ConvFront(TowerModule):
    """Two convolutions that halve time and mel bins each, and a linear of what is left of a frame."""

    def __init__(self, context: TowerContext, geometry: AudioGeometry) -> None:
        super().__init__(context)
        first, second = geometry.channels
        self.layer0 = ConvLayer(context, 1, first, geometry.rms_norm_eps)
        self.layer1 = ConvLayer(context, first, second, geometry.rms_norm_eps)
        self.input_proj_linear = ReplicatedLinear(context.config, geometry.conv_values, geometry.hidden_size)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """[clips, t, bins] and [clips, t] -> [clips, ceil(t / 4), hidden]."""
        mask = mask.bool()
        x, mask = self.layer0(features[:, None], mask)
        x, mask = self.layer1(x, mask)
        # Frequency-major: all channels of the lowest bins first.
        return self.input_proj_linear(x.permute(0, 2, 3, 1).flatten(2))


class ConvLayer(TowerModule):
    """Convolution 3x3 of stride 2 over real frames, LayerNorm of the channels without bias, ReLU."""

    def __init__(self, context: TowerContext, in_channels: int, out_channels: int, eps: float) -> None:
        super().__init__(context)
        options = {"dtype": context.config.params_dtype, "device": init_device(context.config)}
        self.conv = torch.nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1, bias=False, **options)
        self.norm = torch.nn.LayerNorm(out_channels, eps=eps, bias=False, **options)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[clips, channels, t, bins] and [clips, t] -> the same with t and bins halved, rounded up."""
        x = self.conv((x * mask[:, None, :, None]).to(self.conv.weight.dtype))
        x = relu(self.norm(x.movedim(1, -1))).movedim(-1, 1)
        return x, mask[:, ::2]


class ConformerLayer(TowerModule):
    """Half an FFN, attention, light convolution, the other half, norm (transformers `Gemma4AudioLayer`)."""

    def __init__(self, context: TowerContext, geometry: AudioGeometry) -> None:
        super().__init__(context)
        config, size = context.config, geometry.hidden_size
        self.limit = activation_limit(geometry, config.params_dtype)
        self.feed_forward1 = FeedForward(context, geometry)
        self.norm_pre_attn = RMSNorm(config, size, _NORM_EPS)
        self.self_attn = AudioAttention(context, geometry)
        self.norm_post_attn = RMSNorm(config, size, _NORM_EPS)
        self.lconv1d = LightConv(context, geometry)
        self.feed_forward2 = FeedForward(context, geometry)
        self.norm_out = RMSNorm(config, size, _NORM_EPS)

    def forward(self, hidden: Tensor, clip: Tensor, distances: Tensor, clips: int) -> Tensor:
        """[n, hidden], which of the `clips` each frame is of [n], and `relative_positions` -> [n, hidden]."""
        hidden = self.feed_forward1(hidden)
        attention = self.self_attn(self.norm_pre_attn(self._limit(hidden)), clip, distances)
        hidden = hidden + self.norm_post_attn(self._limit(attention))
        hidden = self.feed_forward2(self.lconv1d(hidden, clip, clips))
        return self.norm_out(self._limit(hidden))

    def _limit(self, x: Tensor) -> Tensor:
        return torch.clamp(x, -self.limit, self.limit)


def activation_limit(geometry: AudioGeometry, dtype: torch.dtype) -> float:
    """What activations are clamped to: the config's `gradient_clipping`, as far as the dtype goes."""
    return min(geometry.activation_limit, torch.finfo(dtype).max)


class FeedForward(TowerModule):
    """Norm, FFN with SiLU, norm, half of it added to the input (transformers `Gemma4AudioFeedForward`)."""

    def __init__(self, context: TowerContext, geometry: AudioGeometry) -> None:
        super().__init__(context)
        size, width = geometry.hidden_size, geometry.ffn_hidden_size
        self.limit, self.weight = activation_limit(geometry, context.config.params_dtype), geometry.residual_weight
        self.pre_layer_norm = RMSNorm(context.config, size, _NORM_EPS)
        self.ffw_layer_1 = TowerLinear(context, size, width, "column", geometry.clipped)
        self.ffw_layer_2 = TowerLinear(context, width, size, "row", geometry.clipped)
        self.post_layer_norm = RMSNorm(context.config, size, _NORM_EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> the same."""
        x = self.pre_layer_norm(torch.clamp(hidden, -self.limit, self.limit))
        x = self.ffw_layer_2(silu(self.ffw_layer_1(x)))
        return self.post_layer_norm(torch.clamp(x, -self.limit, self.limit)) * self.weight + hidden


class LightConv(TowerModule):
    """Norm, gated linear, causal depthwise convolution, norm, SiLU, linear (transformers `Gemma4AudioLightConv1d`).

    On every rank in full: the norm in its middle needs all channels.
    """

    def __init__(self, context: TowerContext, geometry: AudioGeometry) -> None:
        super().__init__(context)
        config, size, eps = context.config, geometry.hidden_size, geometry.rms_norm_eps
        self.kernel, self.limit = geometry.conv_kernel, activation_limit(geometry, config.params_dtype)
        self.pre_layer_norm = RMSNorm(config, size, eps)
        self.linear_start = TowerLinear(context, size, 2 * size, None, geometry.clipped)
        self.depthwise_conv1d = torch.nn.Conv1d(
            size,
            size,
            self.kernel,
            groups=size,
            bias=False,
            dtype=config.params_dtype,
            device=init_device(config),
        )
        self.conv_norm = RMSNorm(config, size, eps)
        self.linear_end = TowerLinear(context, size, size, None, geometry.clipped)

    def forward(self, hidden: Tensor, clip: Tensor, clips: int) -> Tensor:
        """[n, hidden] and which of the `clips`, in order, each frame is of [n] -> [n, hidden]."""
        x = glu(self.linear_start(self.pre_layer_norm(hidden)), dim=-1)
        # A gap of zeros before every clip: what a frame sees of the past ends at the start of its clip.
        reach = self.kernel - 1
        place = torch.arange(len(clip), device=clip.device) + reach * clip
        gapped = x.new_zeros(len(clip) + reach * clips, x.shape[1]).index_put((place + reach,), x)
        x = conv1d(gapped.t()[None], self.depthwise_conv1d.weight, groups=x.shape[1])[0].t()[place]
        x = self.conv_norm(torch.clamp(x, -self.limit, self.limit))
        return self.linear_end(silu(x)) + hidden


class AudioAttention(TowerModule):
    """Every frame sees the `window` frames of its clip that end with it (transformers `Gemma4AudioAttention`).

    Scores are those of keys plus those of learned keys of the distance, capped, in float32. The packed sequence is cut
    into blocks of `window` queries; what a block may see lies in it and the block before.
    """

    def __init__(self, context: TowerContext, geometry: AudioGeometry) -> None:
        super().__init__(context)
        size, clipped = geometry.hidden_size, geometry.clipped
        self.head_dim, self.window, self.cap = geometry.head_dim, geometry.window, geometry.logit_cap
        self.q_proj = TowerLinear(context, size, size, "column", clipped)
        self.k_proj = TowerLinear(context, size, size, "column", clipped)
        self.v_proj = TowerLinear(context, size, size, "column", clipped)
        self.post = TowerLinear(context, size, size, "row", clipped)
        self.relative_k_proj = _unclipped_column(context, size)
        config = context.config
        self.per_dim_scale = torch.nn.Parameter(
            torch.zeros(self.head_dim, dtype=config.params_dtype, device=init_device(config))
        )

    def forward(self, hidden: Tensor, clip: Tensor, distances: Tensor) -> Tensor:
        """[n, hidden], which clip each frame is of [n], and `relative_positions` [window, hidden] -> [n, hidden]."""
        n, window = len(hidden), self.window
        query, key, value = (
            projection(hidden).float().unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scale = softplus(self.context.shared(self.per_dim_scale))
        query = query * (self.head_dim**-0.5 / math.log(2)) * scale
        key = key * (math.log(1 + math.e) / math.log(2))
        far = self.relative_k_proj(distances)
        far = (far[0] if isinstance(far, tuple) else far).float().unflatten(-1, (-1, self.head_dim))

        blocks = -(-n // window)
        spare = blocks * window - n
        query = pad(query, (0, 0, 0, 0, 0, spare)).unflatten(0, (blocks, window)).transpose(1, 2)
        key, value = (self._context(pad(x, (0, 0, 0, 0, window, spare))).transpose(1, 2) for x in (key, value))
        clips = self._context(pad(clip, (window, spare), value=-1))

        # Query i of a block stands at place i + window of its context.
        places = torch.arange(2 * window, device=hidden.device)
        distance = places[window:, None] - places
        near = (distance >= 0) & (distance < window)
        visible = (near & (clips[:, window:, None] == clips[:, None, :]))[:, None]
        index = distance.clamp(0, window - 1).expand(blocks, query.shape[1], window, 2 * window)
        scores = query @ key.transpose(2, 3) + (query @ far.permute(1, 2, 0)).gather(-1, index)
        scores = (torch.tanh(scores / self.cap) * self.cap).masked_fill(~visible, _INVALID)
        context = torch.softmax(scores, dim=-1) @ value
        return self.post(context.transpose(1, 2).flatten(0, 1)[:n].flatten(1).to(hidden.dtype))

    def _context(self, x: Tensor) -> Tensor:
        """[(blocks + 1) * window, ...], padded in front by a block -> [blocks, 2 * window, ...]."""
        x = x.unflatten(0, (-1, self.window))
        return torch.cat((x[:-1], x[1:]), dim=1)


def _unclipped_column(context: TowerContext, size: int) -> torch.nn.Module:
    """The projection of distances: split like the heads, never clipped, without the wrapper in its name."""
    config = context.config
    if context.split("column") is None:
        return ReplicatedLinear(config, size, size)
    return ColumnLinear(
        size, size, config=config, init_method=config.init_method, bias=False, tp_group=context.tp_group
    )


def relative_positions(geometry: AudioGeometry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sinusoids [window, hidden] of the distances 0 to window - 1: all sines, then all cosines.

    Frequencies are rounded to the dtype of the model, as transformers' buffer is when a model is loaded.
    """
    half = geometry.hidden_size // 2
    step = math.log(10_000.0) / max(half - 1, 1)
    frequencies = torch.exp(torch.arange(half, device=device) * -step).to(dtype)
    angles = torch.arange(geometry.window, device=device)[:, None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(dtype)
