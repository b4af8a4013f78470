"""The vision tower on packed real patches against transformers' padded one: same weights, same batch, same run, CPU.

    python benchmarks/vision_tower.py [--variant e2b] [--layers 4] [--images 6] [--repeats 5]

The tower has the published widths and random weights, and `--layers` of its 16 or 27 layers, which all cost the same.
Images are of several sizes, so that of all patch slots that the processor pads to (280 soft tokens each), 60 % are
padding. Prints the times of forward, and of forward and backward, and exits with 1 where a ratio is above 0.6.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bridge.geometry import Geometry, VisionGeometry
from bridge.megatron.towers.packing import Images
from bridge.toy.config import published
from recipes.train.setup import start_ranks

BOUND = 0.6
BUDGET = 280
PADDING = 0.6


def batch(geometry: VisionGeometry, count: int) -> tuple[Tensor, Tensor]:
    """Pictures of different shapes, 40 % of the slots real: pixels and positions."""
    kernel = geometry.kernel
    slots = BUDGET * kernel**2
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 16), (7, 12), (12, 7), (4, 8), (16, 8), (13, 6)]  # soft tokens: columns, rows
    pixels = torch.zeros(count, slots, geometry.patch_values)
    positions = torch.full((count, slots, 2), -1)
    for number in range(count):
        columns, rows = (side * kernel for side in shapes[number % len(shapes)])
        pixels[number, : columns * rows] = torch.rand(columns * rows, geometry.patch_values, generator=generator)
        grid = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy"), dim=-1)
        positions[number, : columns * rows] = grid.reshape(-1, 2)
    return pixels, positions


Times = tuple[float, float]


def race(
    first: Callable[[], Tensor], second: Callable[[], Tensor], backward: bool, repeats: int
) -> tuple[Times, Times]:
    """The shortest (wall, processor) seconds of each, run in turn, so that a busy machine is equally unkind to both."""
    best = [(float("inf"), float("inf")), (float("inf"), float("inf"))]
    for _ in range(repeats + 1):
        for number, run in enumerate((first, second)):
            wall, processor = time.perf_counter(), time.process_time()
            with torch.set_grad_enabled(backward):
                output = run()
                if backward:
                    output.float().square().mean().backward()
            took = time.perf_counter() - wall, time.process_time() - processor
            best[number] = min(best[number][0], took[0]), min(best[number][1], took[1])
    return best[0], best[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="e2b", choices=["e2b", "e4b", "26b-a4b", "31b"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"], help="of transformers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    config = published(options.variant)
    config["vision_config"] |= {"num_hidden_layers": options.layers}
    theirs, ours, geometry = build(config, options.attention)
    pixels, positions = batch(geometry, options.images)
    padding = (positions == -1).all(dim=-1).float().mean().item()
    difference = check(theirs, ours, pixels, positions)
    print(
        f"{options.variant}, {options.layers} layers, {options.images} images, {padding:.1%} of the slots are padding"
    )
    print(f"largest difference of the soft tokens, relative: {difference:.1e}")

    failed = difference > 1e-5 or padding < PADDING - 0.02
    for name, backward in (("forward", False), ("forward and backward", True)):
        padded, packed = race(
            lambda: theirs(pixels, positions).last_hidden_state,
            lambda: ours([Images("image", pixels, positions)]),
            backward,
            options.repeats,
        )
        ratio = packed[0] / padded[0]
        failed |= ratio > BOUND
        print(
            f"{name}: packed {packed[0]:.2f} s, transformers padded {padded[0]:.2f} s, ratio {ratio:.2f} (<= {BOUND}); "
            f"in processor time {packed[1] / padded[1]:.2f}",
            flush=True,
        )
    return int(failed)


def build(config: dict, attention: str) -> tuple[torch.nn.Module, torch.nn.Module, VisionGeometry]:
    """transformers' tower and this project's, with the same random weights, in float32 on one rank."""
    start_ranks()
    import transformers

    from bridge.megatron.parallel import Parallel, initialize
    from bridge.megatron.provider import Gemma4Provider
    from bridge.megatron.towers.linear import TowerContext
    from bridge.megatron.towers.vision import VisionTower

    groups = initialize(Parallel())
    geometry = Geometry.from_dict(config)
    assert isinstance(geometry.vision, VisionGeometry)
    megatron = Gemma4Provider(geometry, Parallel(), torch.float32, overrides={"perform_initialization": False}).config
    ours = VisionTower(TowerContext(megatron, groups.tp, geometry.vision), geometry.vision)
    vision = transformers.CONFIG_MAPPING["gemma4_vision"].from_dict(config["vision_config"])
    theirs = transformers.AutoModel.from_config(vision, attn_implementation=attention)
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
    weights = {name: tensor.view(1) if tensor.dim() == 0 else tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=False)
    missing = set(dict(ours.named_parameters())) - set(weights)
    assert not missing, missing
    return theirs, ours, geometry.vision


@torch.no_grad()
def check(theirs: torch.nn.Module, ours: torch.nn.Module, pixels: Tensor, positions: Tensor) -> float:
    expected = theirs(pixels, positions).last_hidden_state
    return ((ours([Images("image", pixels, positions)]) - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    sys.exit(main())
