"""Soft tokens of every tower against transformers' own `get_{image,video,audio}_features`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bridge.errors import BridgeError, UsageError
from bridge.geometry import Geometry
from bridge.megatron.linear import ColumnLinear, ReplicatedLinear
from bridge.megatron.parallel import Parallel, initialize
from bridge.megatron.provider import Gemma4Provider
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
    from bridge.megatron.multimodal import MediaTensors

    model = loaded(folder, dtype, tp)
    with torch.no_grad():
        return {kind: tokens.clone() for kind, tokens in model.soft_tokens(MediaTensors(**media)).items()}


def loaded(folder: Path, dtype: torch.dtype = torch.float32, tp: int = 1, frozen: tuple[str, ...] = ()) -> Any:
    """The multimodal model of a folder, on every rank its part."""
    from bridge.convert.live import load_from_hf
    from bridge.hf.folder import HfFolder
    from bridge.mapping import table_for
    from bridge.megatron.parallel import Parallel, initialize
    from bridge.megatron.provider import Gemma4Provider

    geometry = Geometry.from_folder(folder)
    parallel = Parallel(tp=tp, sequence_parallel=tp > 1)
    groups = initialize(parallel)
    provider = Gemma4Provider(geometry, parallel, dtype, overrides={"perform_initialization": False}, frozen=frozen)
    (model,) = provider.build(groups)
    with HfFolder(folder) as source:
        load_from_hf([model], table_for(geometry), source)
    return model


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


def test_soft_tokens_in_bfloat16(folders: dict[str, Path], ranks: RankPool) -> None:
    """As near to transformers in bfloat16 as that is to itself in float32, or nearer."""
    for variant in ("e2b", "26b-a4b"):
        media = media_of(Geometry.from_folder(folders[variant]))
        truth = reference_soft_tokens(folders[variant], media, torch.float32)
        theirs = reference_soft_tokens(folders[variant], media, torch.bfloat16)
        (ours,) = ranks.run(our_soft_tokens, folders[variant], media, torch.bfloat16, world_size=1)
        for kind in truth:
            assert ours[kind].dtype is torch.bfloat16
            own, noise = mean_relative(ours[kind], truth[kind]), mean_relative(theirs[kind], truth[kind])
            print(f"{variant} {kind}: ours {own:.2e}, transformers {noise:.2e}")
            assert own <= 1.1 * noise, (variant, kind)


def mean_relative(ours: Tensor, truth: Tensor) -> float:
    return ((ours.float() - truth).norm() / truth.norm()).item()


def keys_of(folder: Path, tp: int) -> tuple[set[str], set[str]]:
    from bridge.convert.live import boxes
    from bridge.mapping import table_for

    model = loaded(folder, tp=tp)
    return {box.key for box in boxes([model])}, set(table_for(model.config.geometry).entries)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_has_the_keys_of_the_table(variant: str, folders: dict[str, Path], ranks: RankPool) -> None:
    for keys, entries in ranks.run(keys_of, folders[variant], 2, world_size=2):
        assert keys == entries


def trained_after(folder: Path, media: dict[str, Tensor], frozen: tuple[str, ...]) -> dict[str, bool]:
    """Which parameters of towers and projectors got a gradient, by name."""
    from bridge.mapping.modalities import MODULES
    from bridge.megatron.multimodal import MediaTensors

    model = loaded(folder, frozen=frozen)
    sum(tokens.square().sum() for tokens in model.soft_tokens(MediaTensors(**media)).values()).backward()
    return {
        name: bool(p.grad is not None and p.grad.any())
        for name, p in model.named_parameters()
        if name.startswith(MODULES)
    }


def test_towers_and_projectors_freeze_one_by_one(folders: dict[str, Path], ranks: RankPool) -> None:
    media = media_of(Geometry.from_folder(folders["e2b"]))
    for frozen in ((), ("vision_tower",), ("embed_vision", "audio_tower"), ("embed_audio",)):
        (trained,) = ranks.run(trained_after, folders["e2b"], media, frozen, world_size=1)
        for name, has_gradient in trained.items():
            assert has_gradient == (name.split(".")[0] not in frozen), (name, frozen)


def refusals(folder: Path, calls: dict[str, dict[str, Any]]) -> dict[str, str]:
    """What the model says to each call."""
    model, said = loaded(folder), {}
    for name, inputs in calls.items():
        try:
            with torch.no_grad():
                model(**inputs)
        except BridgeError as error:
            said[name] = f"{type(error).__name__}: {error}"
        else:
            said[name] = "nothing"
    return said


def row(geometry: Geometry, **counts: int) -> dict[str, Tensor]:
    """One row of text with so many placeholders of each kind, and their token types."""
    ids, types = [2, 300, 301], [0, 0, 0]
    for kind, count in counts.items():
        ids += [getattr(geometry.placeholders, kind)] * count + [302]
        types += [{"image": 1, "video": 2, "audio": 3}[kind]] * count + [0]
    return {"input_ids": torch.tensor([ids]), "mm_token_type_ids": torch.tensor([types])}


def test_what_does_not_fit_is_refused_in_one_line(folders: dict[str, Path], ranks: RankPool) -> None:
    folder = folders["26b-a4b"]
    geometry = Geometry.from_folder(folder)
    assert geometry.vision is not None
    pixels, places = images(geometry, [(2, 3), (3, 2)], 90)
    both = {"pixel_values": pixels, "image_position_ids": places}
    frames = {"pixel_values_videos": pixels, "video_position_ids": places}
    strip_pixels, strip_places = images(geometry, [(100, 1)], 900)
    twice = places[:1].clone()
    twice[0, 1] = twice[0, 0]
    strip = torch.full((1, 90, 2), -1)
    strip[0, :64] = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1).view(-1, 2)
    one = {"pixel_values": pixels[:1]}
    audio = {"input_features": torch.zeros(1, 8, 32), "input_features_mask": torch.ones(1, 8, dtype=torch.bool)}
    calls = {
        "more placeholders": row(geometry, image=13) | both,
        "fewer placeholders": row(geometry, image=11) | both,
        "no features": row(geometry, image=12),
        "no placeholders": row(geometry) | both,
        "no token types": {"input_ids": row(geometry, image=12)["input_ids"]} | both,
        "audio": row(geometry, audio=2) | audio,
        "does not pool": row(geometry, image=7) | one | {"image_position_ids": strip},
        "two at one place": row(geometry, image=6) | one | {"image_position_ids": twice},
        "too large": row(geometry, image=100) | {"pixel_values": strip_pixels, "image_position_ids": strip_places},
        "only padding": row(geometry, image=6) | one | {"image_position_ids": torch.full((1, 90, 2), -1)},
        "no positions": row(geometry, image=12) | {"pixel_values": pixels},
        "other patches": row(geometry, image=12) | both | {"pixel_values": pixels[..., :-1]},
        "other positions": row(geometry, image=12) | both | {"image_position_ids": places[:, :-1]},
        "frames not counted": row(geometry, video=12) | frames,
        "frames miscounted": row(geometry, video=12) | frames | {"num_frames_per_video": torch.tensor([3])},
    }
    expected = {
        "more placeholders": "12 image soft tokens for 13 image placeholders",
        "fewer placeholders": "12 image soft tokens for 11 image placeholders",
        "no features": "12 image placeholders, but no image features",
        "no placeholders": "12 image soft tokens for 0 image placeholders",
        "no token types": "mm_token_type_ids",
        "audio": "this model takes none",
        "does not pool": "image 1 of 1 is 8 x 8 patches, which does not pool: both sides must be multiples of 3",
        "two at one place": "image 1 of 1 has two patches at one place",
        "too large": "image 1 of 1 is 300 x 3 patches; the model knows positions up to 256",
        "only padding": "image 1 of 1 has no patches",
        "no positions": "no image_position_ids",
        "other patches": "image pixels have shape",
        "other positions": "image positions have shape",
        "frames not counted": "no num_frames_per_video",
        "frames miscounted": "counts 3 frames, pixel_values_videos holds 2",
    }
    (said,) = ranks.run(refusals, folder, calls, world_size=1)
    for name, text in expected.items():
        assert said[name].startswith("UsageError: "), (name, said[name])
        assert text in said[name], (name, said[name])
        assert "\n" not in said[name]


def test_audio_that_does_not_fit_is_refused(folders: dict[str, Path], ranks: RankPool) -> None:
    folder = folders["e2b"]
    geometry = Geometry.from_folder(folder)
    features, mask = clips(geometry, [40, 30])
    left = mask.clone()
    left[1, :3] = False
    silent = mask.clone()
    silent[1] = False
    calls = {
        "padded before": row(geometry, audio=18) | {"input_features": features, "input_features_mask": left},
        "no real frame": row(geometry, audio=10) | {"input_features": features, "input_features_mask": silent},
        "other bins": row(geometry, audio=18) | {"input_features": features[..., :-1], "input_features_mask": mask},
        "no mask": row(geometry, audio=18) | {"input_features": features},
        "other count": row(geometry, audio=17) | {"input_features": features, "input_features_mask": mask},
    }
    expected = {
        "padded before": "audio clip 2 of 2 is padded before real frames",
        "no real frame": "audio clip 2 of 2 has no real frames",
        "other bins": "audio features have shape",
        "no mask": "no input_features_mask",
        "other count": "18 audio soft tokens for 17 audio placeholders",
    }
    (said,) = ranks.run(refusals, folder, calls, world_size=1)
    for name, text in expected.items():
        assert text in said[name], (name, said[name])


def test_an_unknown_part_cannot_be_frozen(folders: dict[str, Path]) -> None:
    from bridge.megatron.provider import Gemma4Provider

    with pytest.raises(UsageError, match="language_model cannot be frozen"):
        Gemma4Provider(Geometry.from_folder(folders["e2b"]), frozen=("language_model",))


def filled_linears(folder: Path, perform_initialization: bool) -> set[bool]:
    """Whether linears of a model, just built, hold numbers: torch fills what it makes empty with NaN here."""
    torch.use_deterministic_algorithms(True)
    try:
        groups, overrides = initialize(Parallel()), {"perform_initialization": perform_initialization}
        provider = Gemma4Provider(Geometry.from_folder(folder), Parallel(), torch.float32, overrides=overrides)
        [model] = provider.build(groups)
        linears = [module for module in model.modules() if isinstance(module, ReplicatedLinear | ColumnLinear)]
        return {bool(module.weight.isfinite().all()) for module in linears}
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_read_is_not_filled_before(ranks: RankPool, tmp_path: Path) -> None:
    write_toy("e2b", tmp_path)
    for wanted in (False, True):
        assert ranks.run(filled_linears, tmp_path, wanted, world_size=1)[0] == {wanted}
