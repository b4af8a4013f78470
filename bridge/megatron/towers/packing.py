"""Images of different sizes as one packed sequence of real patches.

Patches are packed in the order in which they are pooled: the kernel² patches of a soft token are neighbours, so that
pooling is a mean over an axis. Images with equally many patches are neighbours too, so that attention runs on whole
batches of them instead of image by image. Attention does not care for the order of its patches, because their positions
travel with them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.errors import UsageError


@dataclass(frozen=True)
class PatchPack:
    """How n real patches of [images, slots] are packed.

    `order` [n] int64: which slot of the flattened batch each packed patch comes from. `positions` [n, 2] int64: (x, y).
    `runs`: (images, patches of each) of every group of images that attend among themselves, in packed order. `restore`
    [n / kernel²] int64: where the soft tokens of the batch, in its own order, lie in the packed ones.
    """

    order: Tensor
    positions: Tensor
    runs: tuple[tuple[int, int], ...]
    restore: Tensor


def pack_patches(position_ids: Tensor, kernel: int, table_size: int, what: str = "image") -> PatchPack:
    """Plan the packing of images whose patches stand at `position_ids` [images, slots, 2] int64, (x, y), -1 = padding.

    Raises UsageError, naming the image and its size in patches, for one that does not pool into kernel x kernel squares
    or is larger than `table_size` on a side. transformers gives wrong tokens for some of these without an error.
    """
    if position_ids.dim() != 3 or position_ids.shape[-1] != 2:
        raise UsageError(f"{what} positions have shape {list(position_ids.shape)}, expected [{what}s, patches, 2]")
    places = position_ids.detach().to("cpu", torch.int64)
    slots = places.shape[1]
    orders, counts = [], []
    for number, image in enumerate(places):
        real = (image != -1).all(dim=-1).nonzero().squeeze(1)
        token = _soft_token_of(image[real], kernel, table_size, f"{what} {number + 1} of {len(places)}")
        orders.append(number * slots + real[torch.argsort(token, stable=True)])
        counts.append(len(real))

    # Stable, so that packing and its inverse are the same on every rank.
    by_size = sorted(range(len(counts)), key=lambda number: counts[number])
    order = torch.cat([orders[number] for number in by_size])
    runs: list[tuple[int, int]] = []
    for number in by_size:
        same = bool(runs) and runs[-1][1] == counts[number]
        images = runs.pop()[0] + 1 if same else 1
        runs.append((images, counts[number]))
    starts, start = [0] * len(counts), 0
    for number in by_size:
        starts[number] = start
        start += counts[number] // kernel**2
    restore = torch.cat([torch.arange(counts[i] // kernel**2) + starts[i] for i in range(len(counts))])
    device = position_ids.device
    return PatchPack(order.to(device), places.flatten(0, 1)[order].to(device), tuple(runs), restore.to(device))


def _soft_token_of(places: Tensor, kernel: int, table_size: int, name: str) -> Tensor:
    """Which soft token of its image each patch at (x, y) `places` [n, 2] is pooled into: [n] int64."""
    if len(places) == 0:
        raise UsageError(f"{name} has no patches, only padding")
    width, height = (int(side) + 1 for side in places.amax(dim=0))
    size = f"{name} is {width} x {height} patches"
    if places.amin() < 0 or torch.unique(places[:, 0] + width * places[:, 1]).numel() != len(places):
        raise UsageError(f"{name} has two patches at one place, or one half outside")
    if len(places) != width * height:
        raise UsageError(f"{size}, but {len(places)} are given")
    if width % kernel or height % kernel:
        raise UsageError(f"{size}, which does not pool: both sides must be multiples of {kernel}")
    if max(width, height) > table_size:
        raise UsageError(f"{size}; the model knows positions up to {table_size}")
    return places[:, 0] // kernel + (width // kernel) * (places[:, 1] // kernel)
