"""Batches with pictures, clips and tones: made here, and turned into inputs by the folder's own processor."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge.errors import VerificationError
from bridge.geometry import Geometry
from bridge.mapping.modalities import MODALITIES
from bridge.verify.sample import IGNORE, VerificationSample

SAMPLING_RATE = 16_000


def kinds_of(geometry: Geometry, multiple_of: int = 2) -> tuple[str, ...]:
    """The rows of a batch with everything that the model takes: a multiple of `multiple_of`, text at the end."""
    first, *others = [MODALITIES[name].requests for name in geometry.modalities] or [()]
    both = ("image, audio, text",) if {"vision", "audio"} <= set(geometry.modalities) else ()
    kinds = (*first, *both, *(kind for requests in others for kind in requests), "text")
    return kinds + ("text",) * (-len(kinds) % multiple_of)


def media_sample(
    folder: Path, geometry: Geometry, seed: int, kinds: Sequence[str] | None = None, multiple_of: int = 8
) -> VerificationSample:
    """One row of each of `kinds` (see `kinds_of`), padded on the right. Labels leave placeholders out.

    Raises VerificationError where the folder has no processor that loads, or pillow or torchvision is missing.
    """
    processor = load_processor(folder)
    dice = random.Random(seed)
    kinds = kinds or kinds_of(geometry)
    rows = [dict(processor(**REQUESTS[kind](dice), return_tensors="pt")) for kind in kinds]
    length = max(row["input_ids"].shape[1] for row in rows)
    length += -length % multiple_of

    def padded(name: str, value: int) -> Tensor:
        tensors = [row[name][0] for row in rows]
        return torch.stack([torch.nn.functional.pad(t, (0, length - len(t)), value=value) for t in tensors])

    ids, mask = padded("input_ids", geometry.pad_token_id or 0), padded("attention_mask", 0)
    labels = torch.full_like(ids, IGNORE)
    counted = mask.bool() & ~torch.isin(ids, torch.tensor(sorted(geometry.placeholder_ids)))
    labels[:, :-1] = torch.where(counted[:, 1:], ids[:, 1:], IGNORE)
    names = set().union(*rows) - {"input_ids", "attention_mask", "mm_token_type_ids"}
    media = tuple({name: row[name] for name in names if isinstance(row.get(name), Tensor)} for row in rows)
    return VerificationSample(ids, mask, labels, padded("mm_token_type_ids", 0), media, tuple(kinds))


def load_processor(folder: Path) -> Any:
    """The processor of a folder, by transformers' AutoProcessor. Raises VerificationError."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VerificationError(f"{folder}: its processor does not load ({first_line})") from error


def drawing(width: int, height: int, dice: random.Random) -> Any:
    """A picture with shapes in it, as a PIL image."""
    from PIL import Image, ImageDraw

    def colour() -> tuple[int, int, int]:
        return dice.randrange(256), dice.randrange(256), dice.randrange(256)

    image = Image.new("RGB", (width, height), colour())
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = dice.randrange(width), dice.randrange(height)
        draw.ellipse((x, y, x + width // 3, y + height // 4), fill=colour())
        draw.line((x, 0, width - x, height), fill=colour(), width=2)
    return image


def clip(frames: int, dice: random.Random) -> np.ndarray:
    """A moving picture [frames, height, width, 3] uint8."""
    still = np.array(drawing(90, 60, dice))
    return np.stack([np.roll(still, 7 * frame, axis=1) for frame in range(frames)])


def tone(samples: int, dice: random.Random) -> np.ndarray:
    """A chord with a swell, [samples] float32 at 16 kHz."""
    time = np.arange(samples) / SAMPLING_RATE
    chord = sum(np.sin(2 * np.pi * dice.uniform(110, 1760) * time) for _ in range(4))
    return (0.15 * chord * (0.3 + np.sin(2 * np.pi * 1.5 * time) ** 2)).astype(np.float32)


def _videos(lengths: Sequence[int], dice: random.Random) -> dict[str, Any]:
    """Clips of so many frames each."""
    return {
        "videos": [clip(frames, dice) for frames in lengths],
        "video_metadata": [
            {"total_num_frames": frames, "fps": 1.0, "frames_indices": list(range(frames)), "duration": float(frames)}
            for frames in lengths
        ],
        "do_sample_frames": False,
    }


REQUESTS: Mapping[str, Callable[[random.Random], dict[str, Any]]] = {
    "text": lambda dice: {"text": ["the quick brown fox " * 6]},
    "image": lambda dice: {"text": ["see <|image|> now"], "images": [[drawing(90, 60, dice)]]},
    "two images": lambda dice: {
        "text": ["<|image|> or <|image|> here"],
        "images": [[drawing(120, 40, dice), drawing(50, 70, dice)]],
    },
    "two videos": lambda dice: {"text": ["first <|video|> then <|video|> end"], **_videos((1, 2), dice)},
    "image, video": lambda dice: {
        "text": ["see <|image|> before <|video|> end"],
        "images": [[drawing(90, 60, dice)]],
        **_videos((2,), dice),
    },
    "audio": lambda dice: {"text": ["hear <|audio|> now"], "audio": [tone(14_321, dice)]},
    "image, audio, text": lambda dice: {
        "text": ["hear <|audio|> then look <|image|> and hear <|audio|> done"],
        "images": [[drawing(40, 90, dice)]],
        "audio": [tone(9_000, dice), tone(5_000, dice)],
    },
}
