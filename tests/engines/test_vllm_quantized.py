"""Quantized exports in vLLM on a CPU, as far as its kernels take them; the others end with its own error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.convert.plain import write_plain
from tests.engines.kit import HEAD_DIM, Ask, EngineFailed, ask_vllm, expected, prompts
from tests.functional.conftest import Toy

pytestmark = pytest.mark.engine

BOUND, APART = 1e-4, 0.1
# The words of vLLM 0.32 where it cannot. On a GPU it has kernels for both.
REFUSED = {
    "w4a16": "\"cpu_gemm_wna16\" not implemented for 'Float'",
    "nvfp4": "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported: Marlin FP4 not available",
}
LARGEST, SMALLEST = 448.0, 1 / (448 * 512)


def quantized(toy: Toy, scheme: str, workdir: Path) -> tuple[Path, Path]:
    """The export of E4B in a scheme, and the plain folder that it stands for."""
    import_hf(toy("e4b", head_dim=HEAD_DIM), workdir / "megatron")
    export_hf(workdir / "megatron", workdir / scheme, quantize=scheme)
    write_plain(workdir / scheme, workdir / "plain")
    return workdir / scheme, workdir / "plain"


def test_fp8_dynamic(toy: Toy, tmp_path: Path) -> None:
    """Logits are those of the dequantized weights on inputs that the engine rounds to FP8, a scale per token.

    Where float32 noise meets a tie of that rounding, an input has another code, and what follows differs by a step of
    FP8: half of the positions of short prompts are without one.
    """
    folder, plain = quantized(toy, "fp8-dynamic", tmp_path)
    ids = [prompt[:9] for seed in range(4) for prompt in prompts(folder, seed)]
    (served,) = ask_vllm(folder, [Ask(ids, max_tokens=1)], tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = {name.removesuffix(".weight_scale") for name in file.keys() if name.endswith(".weight_scale")}  # noqa: SIM118

    def rounded(module: torch.nn.Module, inputs: Any) -> tuple[torch.Tensor]:
        scale = (inputs[0].abs().amax(-1, keepdim=True) / LARGEST).clamp(min=SMALLEST)
        codes = (inputs[0] * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        return (codes.float() * scale,)

    def round_inputs(model: torch.nn.Module) -> None:
        modules = dict(model.named_modules())
        for name in names:
            modules[name].register_forward_pre_hook(rounded)

    differences = []
    for change in (round_inputs, None):
        theirs = expected(plain, ids, 1, change)
        both = zip(served, theirs, strict=True)
        differences.append(torch.cat([(a.logprobs - b.logprobs).abs().amax(-1) for a, b in both]))
    same, other = (float(difference.median()) for difference in differences)
    print(f"fp8-dynamic: median {same:.1e}, {other:.1e} on inputs that are not rounded")
    assert same <= BOUND and other > 10 * BOUND


@pytest.mark.parametrize("scheme", sorted(REFUSED))
def test_what_its_cpu_kernels_refuse(toy: Toy, scheme: str, tmp_path: Path) -> None:
    folder, _ = quantized(toy, scheme, tmp_path)
    with pytest.raises(EngineFailed) as failed:
        ask_vllm(folder, [Ask(prompts(folder), max_tokens=1)], tmp_path)
    assert REFUSED[scheme] in str(failed.value)


def test_w4a16_in_bfloat16(toy: Toy, tmp_path: Path) -> None:
    """Of int4 its CPU kernel takes 16 bits: nearer to the dequantized model than to the one from before, by far."""
    folder, plain = quantized(toy, "w4a16", tmp_path)
    ids = prompts(folder)
    (served,) = ask_vllm(folder, [Ask(ids, max_tokens=1)], tmp_path, dtype="bfloat16")
    distances = []
    for model in (plain, toy("e4b", head_dim=HEAD_DIM)):
        both = zip(served, expected(model, ids, 1), strict=True)
        distances.append(torch.cat([(a.logprobs - b.logprobs).abs().flatten() for a, b in both]).median().item())
    print(f"w4a16: median {distances[0]:.1e} from the dequantized model, {distances[1]:.1e} from the one before")
    assert 5 * distances[0] < distances[1]
