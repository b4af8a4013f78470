"""Soft tokens of every tower against transformers' own `get_{image,video,audio}_features`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.geometry import Geometry
from bridge.ranks import RankPool
from bridge.toy import VARIANTS, write_toy

SOFT_TOKENS_RELATIVE = 1e-5


def images(geometry: Geometry, sizes: list[tuple[int, int]], slots: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random pictures of (columns, rows) soft tokens: pixels and positions, padded to `slots` patches."""
    vision = geometry.vision
    assert vision is not None
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(len(sizes), slots, vision.patch_values)
    positions = torch.full((len(sizes), slots, 2), -1)
    for number, (columns, rows) in enumerate(sizes):
        width, height = columns * vision.kernel, rows * vision.kernel
        count = width * height
        pixels[number, :count] = torch.rand(count, vision.patch_values, generator=generator)
        grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), dim=-1)
        positions[number, :count] = grid.reshape(-1, 2)
    return pixels, positions


def clips(geometry: Geometry, frames: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random audio features of so many frames each, padded behind to the longest and some more."""
    assert geometry.audio is not None
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(frames) + 9)[None] < torch.tensor(frames)[:, None]
    features = torch.randn(*mask.shape, geometry.audio.features, generator=generator)
    return features * mask[..., None], mask


def media_of(geometry: Geometry) -> dict[str, Tensor]:
    """Two images of one size and one of another, two videos of different length, two clips of different length."""
    slots = 16 * geometry.vision.kernel**2  # type: ignore[union-attr]
    pixels, positions = images(geometry, [(4, 3), (2, 1), (3, 4), (5, 3)], slots)
    frames, places = images(geometry, [(2, 3)] * 5, 8 * geometry.vision.kernel**2, seed=1)  # type: ignore[union-attr]
    media = {
        "pixel_values": pixels,
        "image_position_ids": positions,
        "pixel_values_videos": frames,
        "video_position_ids": places,
        "num_frames_per_video": torch.tensor([2, 3]),
    }
    if geometry.audio is not None:
        media["input_features"], media["input_features_mask"] = clips(geometry, [101, 64, 7])
    return media


def reference_soft_tokens(folder: Path, media: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What transformers makes of the same features, without padding."""
    from bridge.verify.reference import load_hf

    model = load_hf(folder, Geometry.from_folder(folder), dtype).model
    with torch.no_grad():
        image = model.get_image_features(media["pixel_values"], media["image_position_ids"])
        video = model.get_video_features(
            media["pixel_values_videos"], media["video_position_ids"], media["num_frames_per_video"]
        )
        soft = {"image": torch.cat(image.pooler_output), "video": torch.cat(video.pooler_output)}
        if "input_features" in media:
            audio = model.get_audio_features(media["input_features"], media["input_features_mask"])
            soft["audio"] = audio.pooler_output[audio.attention_mask]
    return soft


def our_soft_tokens(folder: Path, media: dict[str, Tensor], dtype: torch.dtype, tp: int = 1) -> dict[str, Tensor]:
    """The same from the model of this project, loaded live. Runs on every rank."""
    from bridge.convert.live import load_from_hf
    from bridge.hf.folder import HfFolder
    from bridge.mapping import table_for
    from bridge.megatron.multimodal import Media
    from bridge.megatron.parallel import Parallel, initialize
    from bridge.megatron.provider import Gemma4Provider

    geometry = Geometry.from_folder(folder)
    parallel = Parallel(tp=tp, sequence_parallel=tp > 1)
    groups = initialize(parallel)
    provider = Gemma4Provider(geometry, parallel, dtype, overrides={"perform_initialization": False})
    (model,) = provider.build(groups)
    with HfFolder(folder) as source:
        load_from_hf([model], table_for(geometry), source)
    with torch.no_grad():
        return {kind: tokens.clone() for kind, tokens in model.soft_tokens(Media(**media)).items()}  # type: ignore[attr-defined]


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return ((ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()).item()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("toys")
    for variant in VARIANTS:
        write_toy(variant, root / variant, dtype="float32")
    return {variant: root / variant for variant in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_soft_tokens(variant: str, folders: dict[str, Path], ranks: RankPool) -> None:
    media = media_of(Geometry.from_folder(folders[variant]))
    theirs = reference_soft_tokens(folders[variant], media, torch.float32)
    assert set(theirs) == ({"image", "video", "audio"} if variant in ("e2b", "e4b", "12b") else {"image", "video"})
    for tp in (1, 2):
        results = ranks.run(our_soft_tokens, folders[variant], media, torch.float32, tp, world_size=tp)
        for ours in results:
            assert set(ours) == set(theirs)
            for kind in theirs:
                value = relative(ours[kind], theirs[kind])
                print(f"{variant} tp={tp} {kind}: {value:.2e}")
                assert value <= SOFT_TOKENS_RELATIVE, (kind, tp)
