"""Quantized exports in vLLM on a CPU, as far as its kernels take them; the others end with its own error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

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
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def quantized(toy: Toy, scheme: str, workdir: Path) -> tuple[Path, Path]:
    """The export of E4B in a scheme, and the plain folder that it stands for."""
    import_hf(toy("e4b", head_dim=HEAD_DIM), workdir / "megatron")
    export_hf(workdir / "megatron", workdir / scheme, quantize=scheme)
    write_plain(workdir / scheme, workdir / "plain")
    return workdir / scheme, workdir / "plain"


def test_fp8_dynamic(toy: Toy, tmp_path: Path) -> None:
    """Logits are those of the dequantized weights on inputs that the engine rounds to FP8, a scale per token.

    Float32 noise at a tie of that rounding gives an input another code and what follows another value, by a step of
    FP8. So transformers' side rounds what vLLM had, and every input of its own must be that one up to noise: with the
    codes of a tie decided alike, all logits agree. With its own inputs rounded, half of the positions have no tie.
    """
    folder, plain = quantized(toy, "fp8-dynamic", tmp_path)
    ids = [prompt for seed in range(2) for prompt in prompts(folder, seed)]
    asks = [Ask([prompt], max_tokens=1, inputs_file=f"{tmp_path}/inputs-{n}") for n, prompt in enumerate(ids)]
    served = [answer for answers in ask_vllm(folder, asks, tmp_path) for answer in answers]
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = {name.removesuffix(".weight_scale") for name in file.keys() if name.endswith(".weight_scale")}  # noqa: SIM118
    apart: list[float] = []

    def of_vllm(name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        layer, module = name.partition("layers.")[2].split(".", 1)
        for whole, parts in FUSED.items():
            if module.rpartition(".")[2] in parts:
                fused = f"layers.{layer}.{module.rpartition('.')[0]}.{whole}"
                found = [key for key in inputs if key.endswith(fused)]
                if found:
                    return inputs[found[0]]
        (key,) = [key for key in inputs if key.endswith(f"layers.{layer}.{module}")]
        return inputs[key]

    def round_inputs(inputs: dict[str, torch.Tensor] | None) -> Callable[[torch.nn.Module], None]:
        def rounded(name: str) -> Any:
            def hook(module: torch.nn.Module, given: Any) -> tuple[torch.Tensor]:
                own = given[0]
                if inputs is not None:
                    theirs = of_vllm(name, inputs).view_as(own)
                    apart.append(float((own - theirs).abs().max() / theirs.abs().max()))
                    own = theirs
                scale = (own.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=SMALLEST)
                codes = (own * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
                return (codes.float() * scale,)

            return hook

        def change(model: torch.nn.Module) -> None:
            modules = dict(model.named_modules())
            for name in names:
                modules[name].register_forward_pre_hook(rounded(name))

        return change

    def differences(change: list[Callable[[torch.nn.Module], None] | None]) -> torch.Tensor:
        theirs = [expected(plain, [prompt], 1, each)[0] for prompt, each in zip(ids, change, strict=True)]
        return torch.cat([(a.logprobs - b.logprobs).abs().amax(-1) for a, b in zip(served, theirs, strict=True)])

    same = differences([round_inputs(load_file(str(ask.inputs_file))) for ask in asks])
    own, other = differences([round_inputs(None)] * len(ids)), differences([None] * len(ids))
    print(
        f"fp8-dynamic: {same.max():.1e}, inputs of linears {max(apart):.1e}; a median of {own.median():.1e} where ties "
        f"are decided here, of {other.median():.1e} where nothing is rounded"
    )
    assert len(apart) == len(names) * len(ids)
    assert same.max() <= BOUND and max(apart) <= BOUND and own.median() <= BOUND and other.median() > 10 * BOUND


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
