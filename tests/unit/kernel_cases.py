"""The kernels of `bridge.megatron.kernels` against the torch code that they stand for. Run by test_kernels.py.

pytest does not collect this file: Triton's interpreter has to be chosen before any kernel is defined, for a whole
process. With `TRITON_INTERPRET=1` the cases run on a CPU, without on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextMLP, apply_rotary_pos_emb

from bridge.errors import UsageError
from bridge.geometry import Geometry
from bridge.megatron import kernels, loss
from bridge.megatron.activation import gated_gelu, geglu
from bridge.megatron.attention import norm_and_rotate
from bridge.megatron.fp8_experts import quantize_columns, quantize_rows
from bridge.megatron.local_dispatch import LocalDispatcher
from bridge.megatron.moe import scale_rows
from bridge.megatron.norm import rms_norm
from bridge.megatron.provider import Gemma4Provider
from bridge.megatron.rope import Rotary
from bridge.toy.config import toy_config

from .kernel_kit import DEVICE, DTYPES, EPS, FLOAT32_BOUND, Function, both, compare, one_rounding, random


def test_kernels_of_nobody_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.from_dict(toy_config("e2b").written)
    with pytest.raises(UsageError, match="kernels=fast: known are auto, torch, triton"):
        _ = Gemma4Provider(geometry, overrides={"kernels": "fast"}).config
    assert Gemma4Provider(geometry).config.kernels == "auto"
    monkeypatch.setattr(kernels, "installed", lambda: False)
    with pytest.raises(UsageError, match="the package triton is not installed"):
        _ = Gemma4Provider(geometry, overrides={"kernels": "triton"}).config


def test_rows_farther_apart_than_an_int32_counts() -> None:
    """As in [65536, 2 * 21504]. The memory between the rows is never touched."""
    torch.manual_seed(0)
    wide = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = wide.as_strided((3, 64), (2**30, 1)).copy_(torch.randn(3, 64))
    weight, gradient = random(64, dtype=torch.bfloat16), [random(3, 64, dtype=torch.bfloat16)]

    def heads(who: str, x: Tensor) -> Tensor:
        rotary = Rotary(*(torch.ones(3, 1, 1, 16, dtype=x.dtype, device=x.device) for _ in range(2)))
        mixed = x.unflatten(1, (1, 1, 4, 16))
        return torch.cat(
            norm_and_rotate(mixed, range(2), 2, weight[:16], weight[:16], rotary, EPS, who), dim=2
        ).flatten(1)

    functions: list[Callable[[str, Tensor], Tensor]] = [
        lambda who, x: rms_norm(x, weight, EPS, x, kernels=who),
        lambda who, x: gated_gelu(x, x, who),
        heads,
    ]
    for function in functions:
        found, expected = (both(partial(function, who), [x], gradient) for who in ("triton", "torch"))
        for a, b in zip(found, expected, strict=True):
            one_rounding(a.float(), b.float())


# RMSNorm


def norm_of(who: str, names: str) -> Function:
    """Of x, and of those of weight and residual that `names` has."""

    def run(x: Tensor, *others: Tensor) -> Tensor:
        given = dict(zip(names.split(), others, strict=True))
        return rms_norm(x, given.get("weight"), EPS, given.get("residual"), kernels=who)

    return run


@DTYPES
@pytest.mark.parametrize("names", ["weight", "", "weight residual", "residual"])
@pytest.mark.parametrize("shape", [(3, 2, 1536), (2, 5376), (7, 3, 100), (1, 3), (0, 64), (5, 0, 8)], ids=str)
def test_rms_norm(shape: tuple[int, ...], names: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    others = {"weight": random(shape[-1], dtype=dtype), "residual": random(*shape, dtype=dtype)}
    inputs = [random(*shape, dtype=dtype, scale=3.0), *(others[name] for name in names.split())]
    compare(norm_of("triton", names), norm_of("torch", names), inputs)


@DTYPES
def test_rms_norm_of_strided_views(dtype: torch.dtype) -> None:
    """Rows of a wider tensor, transposed rows, and gradients that are one number for all."""
    torch.manual_seed(0)
    weight = random(48, dtype=dtype)
    wide = random(4, 3, 100, dtype=dtype)
    for x in (wide[..., 10:58], wide.transpose(0, 1)[..., :48], random(48, 6, dtype=dtype).t()):
        for residual in (x, random(48, *x.shape[:-1], dtype=dtype).movedim(0, -1)):
            compare(norm_of("triton", "weight residual"), norm_of("torch", "weight residual"), [x, weight, residual])
    x = wide[..., :48].detach().requires_grad_()
    rms_norm(x, weight, EPS, kernels="triton").sum().backward()
    y = wide[..., :48].detach().requires_grad_()
    rms_norm(y, weight, EPS, kernels="torch").sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)


def test_rms_norm_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    for with_scale in (True, False):
        module = Gemma4RMSNorm(320, EPS, with_scale).to(DEVICE)
        weight = torch.nn.init.normal_(module.weight) if with_scale else None
        x = random(5, 320, dtype=torch.float32)
        torch.testing.assert_close(rms_norm(x, weight, EPS, kernels="triton"), module(x), rtol=1e-6, atol=1e-6)


def test_what_is_frozen_gets_no_gradient() -> None:
    x, weight = random(5, 32, dtype=torch.float32), random(32, dtype=torch.float32)
    for trained in ((True, False), (False, True)):
        leaves = [leaf.detach().requires_grad_(wanted) for leaf, wanted in zip((x, weight), trained, strict=True)]
        rms_norm(*leaves, EPS, kernels="triton").square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == list(trained)


def test_gradients_are_the_same_every_time() -> None:
    x, weight = random(500, 64, dtype=torch.float32), random(64, dtype=torch.float32)
    gradient = random(500, 64, dtype=torch.float32)
    runs = [both(norm_of("triton", "weight"), [x, weight], [gradient])[-1] for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in pairwise(runs))


# GeGLU


@DTYPES
@pytest.mark.parametrize("shape", [(3, 2, 2 * 704), (2, 2 * 1500), (5, 2), (0, 64), (4, 6)], ids=str)
def test_geglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = random(*shape, dtype=dtype, scale=3.0)
    compare(lambda x: geglu(x, "triton"), lambda x: geglu(x, "torch"), [x])
    gate, up = random(*shape, dtype=dtype), random(*shape, dtype=dtype)
    compare(lambda g, u: gated_gelu(g, u, "triton"), lambda g, u: gated_gelu(g, u, "torch"), [gate, up])


@DTYPES
def test_geglu_of_strided_views(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    per_layer = random(4, 2, 3, 40, dtype=dtype)
    for up in (per_layer[:, :, 1], per_layer.transpose(0, 1)[..., 2, :].transpose(0, 1)):
        inputs = [random(4, 2, 40, dtype=dtype), up]
        compare(lambda g, u: gated_gelu(g, u, "triton"), lambda g, u: gated_gelu(g, u, "torch"), inputs)
    for x in (random(6, 90, dtype=dtype)[:, 5:85], random(80, 6, dtype=dtype).t()):
        compare(lambda x: geglu(x, "triton"), lambda x: geglu(x, "torch"), [x])


def test_geglu_of_extreme_values() -> None:
    """Neither overflows nor cancels: far below zero torch's own float32 is worse than the kernel's."""
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, -3.0, -5.5, -8.0, -40.0, 40.0, 1e4, -1e4, 1e15, -1e15], device=DEVICE)
    up = torch.ones_like(x)
    found = both(lambda g, u: gated_gelu(g, u, "triton"), [x, up], [up])
    exact = both(lambda g, u: gated_gelu(g, u, "torch"), [x.double(), up.double()], [up])
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=1e-16)
    assert gated_gelu(torch.tensor([float("nan")], device=DEVICE), up[:1], "triton").isnan().all()


@DTYPES
def test_geglu_is_the_mlp_of_transformers(dtype: torch.dtype) -> None:
    """In bf16 to the bit, but for where the two formulas of tanh round apart: the activation is rounded first."""
    torch.manual_seed(0)
    config = Gemma4TextConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, hidden_size_per_layer_input=0)
    module = Gemma4TextMLP(config, 0).to(DEVICE, dtype)
    hidden = random(50, 64, dtype=dtype, scale=4.0)
    both_halves = torch.cat([module.gate_proj(hidden), module.up_proj(hidden)], dim=-1)
    found, expected = module.down_proj(geglu(both_halves, "triton")), module(hidden)
    if dtype is torch.float32:
        assert (found - expected).abs().max() <= FLOAT32_BOUND * expected.abs().max()
        return
    one_rounding(geglu(both_halves, "triton"), module.act_fn(module.gate_proj(hidden)) * module.up_proj(hidden))
    assert (found - expected).norm() <= 2**-9 * expected.norm()


# Norms and rotation


def angles(tokens: tuple[int, int], d: int, dtype: torch.dtype) -> Rotary:
    values = torch.randn(*tokens, 1, d) * 2
    return Rotary(values.cos().to(dtype).to(DEVICE), values.sin().to(dtype).to(DEVICE))


def projections(kinds: int, own: range, rotary: Rotary, kernels: str) -> Function:
    """Of the fused projection and the weights."""

    def run(mixed: Tensor, query_weight: Tensor, key_weight: Tensor | None = None) -> Sequence[Tensor]:
        turned = Rotary(*(x.to(mixed.dtype) for x in rotary))
        return norm_and_rotate(mixed, own, kinds, query_weight, key_weight, turned, EPS, kernels)

    return run


@DTYPES
@pytest.mark.parametrize(
    ("tokens", "groups", "queries", "kinds", "own", "d"),
    [
        ((2, 1), 1, 8, 2, range(8), 256),
        ((2, 1), 2, 4, 1, range(4), 512),
        ((3, 1), 1, 8, 0, range(8), 256),
        ((3, 2), 2, 3, 2, range(3), 24),
        ((3, 2), 1, 6, 2, range(2, 4), 16),
        ((3, 2), 1, 4, 1, range(2, 4), 16),
        ((5, 1), 3, 1, 1, range(1), 2),
        ((0, 1), 1, 2, 2, range(2), 8),
    ],
    ids=str,
)
def test_norm_and_rotation(
    tokens: tuple[int, int], groups: int, queries: int, kinds: int, own: range, d: int, dtype: torch.dtype
) -> None:
    """`kinds` 2: q, k and v; 1: k is v too; 0: q alone. `own`: the queries of this rank, where a group has several."""
    torch.manual_seed(0)
    rows = queries + kinds
    rotary = angles(tokens, d, dtype)
    weights = [random(d, dtype=dtype) for _ in range(2 if kinds else 1)]
    fused = random(*tokens, groups * rows * d, dtype=dtype, scale=2.0)
    wider = random(*tokens, 2 * groups * rows * d, dtype=dtype).chunk(2, dim=-1)[1]
    for flat in (fused, wider):
        inputs = [flat.unflatten(-1, (groups, rows, d)), *weights]
        compare(
            projections(kinds, own, rotary, "triton"),
            projections(kinds, own, rotary, "torch"),
            inputs,
            outputs=3 if kinds else 1,
        )


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_that_attention_hands_back_in_its_own_strides(batch: int) -> None:
    torch.manual_seed(0)
    rotary, own = angles((4, batch), 16, torch.float32), range(2)
    inputs = [random(4, batch, 2, 4, 16, dtype=torch.float32), *(random(16, dtype=torch.float32) for _ in range(2))]
    # [b, heads, s, d] in memory, and one number for all
    gradients = [random(batch, heads, 4, 16, dtype=torch.float32).permute(2, 0, 1, 3) for heads in (4, 2)]
    gradients.append(torch.ones(1, device=DEVICE).expand(4, batch, 2, 16))
    found = both(projections(2, own, rotary, "triton"), inputs, gradients)
    expected = both(projections(2, own, rotary, "torch"), inputs, gradients)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_rotation_is_that_of_transformers() -> None:
    torch.manual_seed(0)
    rotary = angles((5, 1), 32, torch.float32)
    norm = Gemma4RMSNorm(32, EPS).to(DEVICE)
    torch.nn.init.normal_(norm.weight)
    mixed = random(5, 1, 1, 4, 32, dtype=torch.float32)
    query, key, value = norm_and_rotate(mixed, range(2), 2, norm.weight, norm.weight, rotary, EPS, "triton")
    cos, sin = (x[:, :, 0].transpose(0, 1) for x in rotary)
    heads = apply_rotary_pos_emb(norm(mixed[:, :, 0, :3]).transpose(0, 1), cos, sin, unsqueeze_dim=2).transpose(0, 1)
    torch.testing.assert_close(query, heads[:, :, :2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(key, heads[:, :, 2:3], rtol=1e-6, atol=1e-6)
    plain = Gemma4RMSNorm(32, EPS, with_scale=False)(mixed[:, :, 0, 3:])
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=1e-6)


# Loss


@DTYPES
@pytest.mark.parametrize(
    ("vocabulary", "weighted", "z_loss", "softcap", "padding"),
    [
        (20_000, False, 0.0, 30.0, 0),
        (20_000, True, 1e-2, 30.0, 0),
        (4096, True, 0.0, None, 0),
        (37, False, 1e-2, None, 0),
        (37, False, 0.0, 2.0, 0),
        (4099, True, 1e-2, 30.0, 5),
    ],
)
def test_loss(
    vocabulary: int, weighted: bool, z_loss: float, softcap: float | None, padding: int, dtype: torch.dtype
) -> None:
    """From the hidden states on, with labels that are ignored, and rows of the weight that are no words."""
    torch.manual_seed(0)
    labels = torch.randint(vocabulary, (2, 3), device=DEVICE)
    labels[0, 1] = loss.IGNORE
    labels[1, 2] = vocabulary - 1
    factors = torch.rand(2, 3, device=DEVICE) if weighted else torch.ones(2, 3, device=DEVICE)

    def run(kernels: str) -> Function:
        def losses(hidden: Tensor, weight: Tensor) -> Tensor:
            options = {"softcap": softcap, "z_loss": z_loss, "kernels": kernels, "vocab_size": vocabulary}
            weight = torch.nn.functional.pad(weight, (0, 0, 0, padding), value=9.0)
            return loss.linear_cross_entropy(hidden, weight, labels, **options)

        return losses

    inputs = [random(3, 2, 16, dtype=dtype, scale=4.0), random(vocabulary, 16, dtype=dtype, scale=4.0)]
    found, expected = (both(run(kernels), inputs, [factors]) for kernels in ("triton", "torch"))
    if padding:
        padding = 0  # as if there were none
        for a, b in zip(expected, both(run("torch"), inputs, [factors]), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is b.dtype
        bound = 2e-6 if dtype is torch.float32 else 2**-9
        assert (a.float() - b.float()).norm() <= bound * b.float().norm()


# Experts


@DTYPES
@pytest.mark.parametrize("shape", [(13, 40), (3, 1300), (0, 8)], ids=str)
def test_outputs_of_experts_are_weighed(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """The probabilities are float32 in any model: their gradient is no value of bf16."""
    torch.manual_seed(0)
    rows, probs, gradient = (
        random(*shape, dtype=dtype),
        torch.rand(shape[0], device=DEVICE),
        random(*shape, dtype=dtype),
    )
    found, expected = (both(partial(scale_rows, kernels=who), [rows, probs], [gradient]) for who in ("triton", "torch"))
    assert [x.dtype for x in found] == [dtype, dtype, torch.float32]
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(found[2], expected[2], rtol=FLOAT32_BOUND, atol=FLOAT32_BOUND * shape[1] ** 0.5)


@DTYPES
@pytest.mark.parametrize("shape", [(13, 40), (3, 1300), (0, 8)], ids=str)
def test_tokens_go_to_their_experts_and_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Both ways, and no host waits for a GPU."""
    torch.manual_seed(0)
    experts, topk, group = 8, 3, SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    chosen = torch.randn(shape[0], experts, device=DEVICE).topk(topk).indices
    routing_map = torch.zeros(shape[0], experts, dtype=torch.bool, device=DEVICE).scatter_(1, chosen, True)
    probs = routing_map.float()

    def run(who: str) -> Function:
        config, groups = SimpleNamespace(moe_router_topk=topk, kernels=who), SimpleNamespace(ep=group, expt_tp=group)
        groups.tp_ep = group
        dispatcher = LocalDispatcher(config, groups)

        def there_and_back(tokens: Tensor, weight: Tensor) -> Sequence[Tensor]:
            rows, _ = dispatcher.dispatch_preprocess(tokens, routing_map, probs)
            return rows, dispatcher.combine_postprocess(rows * weight)

        return there_and_back

    inputs = [random(*shape, dtype=dtype), random(shape[1], dtype=dtype)]
    compare(run("triton"), run("torch"), inputs, outputs=2)
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            run("triton")(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# FP8


@DTYPES
@pytest.mark.parametrize("shape", [(3, 5, 48), (2, 70, 130), (1, 3, 2816)], ids=str)
def test_rounding_to_fp8(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """To the bit, rows of zeros and rows 10^10 apart included."""
    torch.manual_seed(0)
    x = random(*shape, dtype=dtype) * torch.logspace(-6, 4, shape[1])[:, None].to(DEVICE, dtype)
    x[0, 1:2] = 0
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    for quantize, given in ((quantize_rows, x), (quantize_columns, x), (quantize_rows, turned)):
        values, scales = quantize(given, "triton")
        expected, sizes = quantize(given, "torch")
        assert values.is_contiguous() and values.dtype is expected.dtype
        assert torch.equal(values.float(), expected.float()) and torch.equal(scales, sizes)
    assert quantize_rows(x[:, :0], "triton")[0].shape == (shape[0], 0, shape[2])
    x[:, -1:] = float("nan")
    assert torch.equal(quantize_rows(x, "triton")[0].float().isnan().any(-1), x.isnan().any(-1))


def test_every_number_of_fp8_and_what_lies_between() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].sort().values
    middles = (numbers[1:] + numbers[:-1]) / 2
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-1e9, 1e9)]
    # Rows that reach to 448 are rounded as they are.
    x = torch.cat([numbers, middles, *beside])[:, None].expand(-1, 2).clone()
    x[:, 1] = 448
    values, scales = (found.cpu() for found in quantize_rows(x.to(DEVICE), "triton"))
    assert (scales == 1).all() and torch.equal(values.float(), x.to(values.dtype).float())
