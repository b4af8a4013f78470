"""`export --quantize` on toys against what llm-compressor's data-free path makes of the same folders, byte for byte.

    PYTHONPATH=DIR python -m benchmarks.llmcompressor [--variants e2b 12b]

DIR holds llm-compressor (0.14), which the environment of the tests has no room for: `uv pip install --target DIR
--no-deps llmcompressor loguru`. A line for each model and scheme: how many tensors are equal, and the names of others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from compressed_tensors.quantization import (  # type: ignore[import-untyped]
    QuantizationScheme,
    preset_name_to_scheme,
)
from safetensors.torch import load_file
from torch import Tensor

from bridge.convert.export import export_hf
from bridge.convert.folders import import_hf
from bridge.toy import VARIANTS, write_toy

# What the export leaves as it is, in llm-compressor's words; of w4a16 and nvfp4 also widths that groups do not divide.
_IGNORED = [f"re:.*{part}.*" for part in ("vision", "audio", "router", "embed", "per_layer", "norm")] + ["lm_head"]


def schemes() -> dict[str, QuantizationScheme]:
    w4a16 = preset_name_to_scheme("W4A16", ["Linear"])
    assert w4a16.weights is not None
    w4a16.weights.group_size = 32
    return {
        "fp8-dynamic": preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]),
        "w4a16": w4a16,
        "nvfp4": preset_name_to_scheme("NVFP4A16", ["Linear"]),
    }


def compare(variant: str, preset: str, scheme: QuantizationScheme, folder: Path) -> str:
    from llmcompressor.entrypoints.model_free import model_free_ptq  # type: ignore[import-not-found]

    write_toy(variant, folder / "plain", dead_kv=variant in ("e2b", "e4b"))
    import_hf(folder / "plain", folder / "megatron")
    export_hf(folder / "megatron", folder / "ours", quantize=preset)
    odd = ["re:.*experts.*down_proj"] if variant == "26b-a4b" and preset != "fp8-dynamic" else []
    try:
        model_free_ptq(folder / "plain", folder / "theirs", scheme=scheme, ignore=_IGNORED + odd, device="cpu")
    except Exception as error:  # whatever it refuses a model with
        return f"refused there: {' '.join(str(error).split())[:100]}"
    ours = load_file(folder / "ours" / "model.safetensors")
    theirs: dict[str, Tensor] = {}
    for file in (folder / "theirs").glob("*.safetensors"):
        theirs |= load_file(file)
    both = sorted(ours.keys() & theirs.keys())
    other = [name for name in both if not _equal(ours[name], theirs[name])]
    alone = [sorted(a.keys() - b.keys()) for a, b in ((ours, theirs), (theirs, ours))]
    more = f"ours alone {alone[0][:2]}, theirs {alone[1][:2]}"
    return f"{len(both) - len(other)} equal; others {other[:3]} ({len(other)}); {more}"


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    for variant in parser.parse_args().variants:
        for preset, scheme in schemes().items():
            with tempfile.TemporaryDirectory() as folder:
                print(variant, preset, compare(variant, preset, scheme, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
