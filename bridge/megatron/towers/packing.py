"""Images of different sizes as one packed sequence of real patches.

Patches are packed in the order in which they are pooled: the kernel² patches of a soft token are neighbours, so that
pooling is a mean over an axis. Images with equally many patches are neighbours too, so that attention runs on whole
batches of them instead of image by image. Attention does not care for the order of its patches, because their positions
travel with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bridge.errors import UsageError
from bridge.megatron.visibility import send


@dataclass(frozen=True)
class Images:
    """A batch of images, or of video frames: pixels [images, slots, values] in [0, 1], (x, y) [images, slots, 2] int64.

    Slots at (-1, -1) are padding. `what` is how errors name one of them.
    """

    what: str
    pixels: Tensor
    position_ids: Tensor

    @cached_property
    def places(self) -> Tensor:
        """The positions on the CPU, where packing is planned."""
        return self.position_ids.detach().to("cpu", torch.int64)

    @property
    def num_patches(self) -> int:
        """How many patches are real."""
        return int((self.places != -1).all(dim=-1).sum())

    def check(self, patch_values: int) -> None:
        """Raises UsageError where pixels and positions are not of the same patches, or patches not of that size."""
        pixels, positions = list(self.pixels.shape), list(self.position_ids.shape)
        if len(pixels) != 3 or pixels[-1] != patch_values:
            raise UsageError(
                f"{self.what} pixels have shape {pixels}, expected [{self.what}s, patches, {patch_values}]"
            )
        if positions != [*pixels[:2], 2]:
            raise UsageError(f"{self.what} positions have shape {positions}, expected {[*pixels[:2], 2]}")


@dataclass(frozen=True)
class PatchPack:
    """How n real patches of batches [images, slots] are packed.

    `order` [n] int64: which slot of the flattened batches, one after the other, each packed patch comes from.
    `positions` [n, 2] int64: (x, y). `runs`: (images, patches of each) of every group of images that attend among
    themselves, in packed order. `restore` [n / kernel²] int64: where the soft tokens of the batches, in their own
    order, lie in the packed ones.
    """

    order: Tensor
    positions: Tensor
    runs: tuple[tuple[int, int], ...]
    restore: Tensor


def pack_patches(batches: Sequence[Images], kernel: int, patch_values: int, table_size: int) -> PatchPack:
    """Plan the packing of all images of some batches.

    Raises UsageError, naming the image and its size in patches, for one that does not pool into kernel x kernel squares
    or is larger than `table_size` on a side. transformers gives wrong tokens for some of these without an error.
    """
    orders: list[Tensor] = []
    counts: list[int] = []
    first = 0
    for batch in batches:
        batch.check(patch_values)
        for number, image in enumerate(batch.places):
            real = (image != -1).all(dim=-1).nonzero().squeeze(1)
            name = f"{batch.what} {number + 1} of {len(batch.places)}"
            token = _soft_token_of(image[real], kernel, table_size, name)
            orders.append(first + real[torch.argsort(token, stable=True)])
            counts.append(len(real))
            first += len(image)

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
    device = batches[0].pixels.device
    places = torch.cat([batch.places.flatten(0, 1) for batch in batches])[order]
    return PatchPack(send(order, device), send(places, device), tuple(runs), send(restore, device))


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
