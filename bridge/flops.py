"""How many floating-point operations a forward pass has to do, counted from the geometry.

A product of [m, k] and [k, n] is 2·m·k·n. Counted are the matrix products that the mathematics asks for: attention of
the pairs of tokens that see each other, the experts that a token goes to, the patches that an image has. Norms,
activations, lookups, padding and recomputation are not. A backward pass does twice as many.
"""

from __future__ import annotations

from collections.abc import Iterable

from bridge.geometry import AudioGeometry, Geometry, LayerGeometry, VisionGeometry


def decoder_flops(geometry: Geometry) -> int:
    """Per token: the linears of all layers, without the products of attention and the head."""
    total = sum(layer_flops(geometry, layer) for layer in geometry.layers)
    if geometry.ple is not None:
        total += 2 * geometry.hidden_size * geometry.num_layers * geometry.ple.dim
    return total


def layer_flops(geometry: Geometry, layer: LayerGeometry) -> int:
    """Per token: the linears of one layer."""
    hidden = geometry.hidden_size
    rows = 2 * layer.q_size  # q and o
    if not layer.shares_kv:
        rows += layer.kv_size if layer.k_eq_v else 2 * layer.kv_size
    rows += 3 * layer.ffn_hidden_size
    if geometry.moe is not None:
        rows += geometry.moe.num_experts + 3 * geometry.moe.topk * geometry.moe.ffn_hidden_size
    if geometry.ple is not None:
        rows += 2 * geometry.ple.dim
    return 2 * hidden * rows


def head_flops(geometry: Geometry) -> int:
    """Of the head, per token whose logits are needed."""
    return 2 * geometry.hidden_size * geometry.vocab_size


def attention_flops(layer: LayerGeometry) -> int:
    """Of a layer's attention, per pair of a query and a key that it sees: the score, and its part of the output."""
    return 4 * layer.q_size


def vision_flops(geometry: Geometry, patches: Iterable[int]) -> int:
    """Of images or frames of so many patches each, projector included."""
    vision, total = geometry.vision, 0
    assert vision is not None
    project = 2 * vision.output_size * geometry.hidden_size
    for count in patches:
        if isinstance(vision, VisionGeometry):
            rows = 4 * vision.q_size + 3 * vision.ffn_hidden_size
            layer = 2 * vision.hidden_size * rows * count + 4 * vision.q_size * count**2
            total += 2 * vision.patch_values * vision.hidden_size * count + vision.num_layers * layer
        else:
            total += 2 * vision.patch_values * vision.output_size * count
        total += count // vision.kernel**2 * project
    return total


def audio_flops(geometry: Geometry, frames: Iterable[int]) -> int:
    """Of clips of so many input frames each, projector included."""
    audio, total = geometry.audio, 0
    assert audio is not None
    for count in frames:
        tokens = count
        if isinstance(audio, AudioGeometry):
            half, tokens = -(-count // 2), -(-count // 4)
            bins, (first, second) = audio.features, audio.channels
            total += 2 * 9 * (half * -(-bins // 2) * first + tokens * -(-bins // 4) * first * second)
            size = audio.hidden_size
            pairs = sum(min(place + 1, audio.window) for place in range(tokens))
            # Two FFNs of two halves, q, k, v and post, the gated linear and the one behind the convolution.
            linears = 4 * audio.ffn_hidden_size + 4 * size + 3 * size + audio.conv_kernel
            # Scores of keys, of distances, and the output; the keys of the distances once.
            layer = 2 * size * linears * tokens + 6 * size * pairs + 2 * size**2 * audio.window
            total += 2 * audio.conv_values * size * tokens + audio.num_layers * layer
            total += 2 * size * audio.output_size * tokens
        total += 2 * audio.output_size * geometry.hidden_size * tokens
    return total
