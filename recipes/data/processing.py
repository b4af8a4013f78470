"""Media through a model's processor: the soft tokens that stand for them in a text, and their contents as tensors."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridge.errors import BridgeError, DataError, UsageError
from bridge.geometry import Geometry
from bridge.mapping.modalities import MODALITIES
from recipes.data import media as media_files
from recipes.data.dialects import MEDIA_KINDS
from recipes.data.sample import Blob, Media
from recipes.data.supervision import Span

PLACEHOLDERS = {kind: f"<|{kind}|>" for kind in MEDIA_KINDS}
_ANY = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))
_KIND_OF = {token: kind for kind, token in PLACEHOLDERS.items()}

Decoded = tuple[Media, Any]
ReadMedia = Callable[[Blob, str], bytes]


class MediaProcessor:
    """The processor of a model folder. One per thread: `fork` makes another.

    `kinds`: the media that the model itself takes; its processor may know more.
    """

    def __init__(self, folder: Path, geometry: Geometry, *, has_processor: bool) -> None:
        self.folder = folder
        # Forks have the processor of the first one.
        self._root, self._lock = self, threading.RLock()
        kinds = (kind for name in geometry.modalities for kind in MODALITIES[name].features)
        self.kinds: frozenset[str] = frozenset(kinds) if has_processor else frozenset()

    @cached_property
    def processor(self) -> Any:
        """Made when the first media come: what it imports takes seconds, which text alone need not wait for.

        Loaded once, whichever thread asks first; every fork has a copy. Raises UsageError.
        """
        with self._lock:
            if self._root is not self:
                return copy.deepcopy(self._root.processor)
            from transformers import AutoProcessor

            try:
                return AutoProcessor.from_pretrained(self.folder, trust_remote_code=False)
            except Exception as error:
                raise UsageError(f"{self.folder}: its processor cannot be loaded ({_line(error)})") from error

    def fork(self) -> MediaProcessor:
        """One for another thread: processors change inside while they work."""
        other = copy.copy(self)
        vars(other).pop("processor", None)
        return other

    def tensors(self, media: Sequence[Media], read: ReadMedia, at: str) -> tuple[dict[str, torch.Tensor], int]:
        """What the processor makes of media: tensors as it names them, and the number of soft tokens they stand for.

        Raises DataError.
        """
        batch = self._process([(item, self._decode(item, read, at)) for item in media], at)
        soft = int((np.asarray(batch["mm_token_type_ids"]) != 0).sum())
        text_keys = {"input_ids", "attention_mask", "mm_token_type_ids", "text_replacement_offsets"}
        return {key: torch.as_tensor(value) for key, value in batch.items() if key not in text_keys}, soft

    def types(self, ids: np.ndarray) -> np.ndarray:
        """Of each token, uint8 [n]: 0 text, 1 image, 2 video, 3 audio."""
        return np.asarray(self.processor.create_mm_token_type_ids([ids.tolist()])[0], np.uint8)

    def with_soft_tokens(
        self, text: str, spans: Sequence[Span], media: Sequence[Media], read: ReadMedia, at: str
    ) -> tuple[str, list[Span]]:
        """The text with every placeholder grown to the soft tokens that the processor counts, and the spans in it.

        Raises DataError.
        """
        soft = self._soft_tokens(media, read, at)
        grown, edges, position = "", [], 0
        for found in _ANY.finditer(text):
            replacement = next(soft[_KIND_OF[found.group()]])
            grown += text[position : found.start()] + replacement
            edges.append((found.end(), len(replacement) - len(found.group())))
            position = found.end()
        grown += text[position:]

        def moved(edge: int) -> int:
            return edge + sum(growth for end, growth in edges if end <= edge)

        return grown, [(moved(start), moved(end)) for start, end in spans]

    def _soft_tokens(self, media: Sequence[Media], read: ReadMedia, at: str) -> dict[str, Iterator[str]]:
        """What stands in the place of each placeholder, by kinds. Of an image its size is enough."""
        images = [self._image_tokens(item, read, at) for item in media if item.kind == "image"]
        others = [item for item in media if item.kind != "image"]
        found: dict[str, list[str]] = {kind: [] for kind in MEDIA_KINDS}
        if others:
            batch = self._process([(item, self._decode(item, read, at)) for item in others], at)
            for item, change in zip(others, batch["text_replacement_offsets"][0], strict=True):
                found[item.kind].append(change["replacement"])
        return {kind: iter(tokens) for kind, tokens in (found | {"image": images}).items()}

    def _image_tokens(self, item: Media, read: ReadMedia, at: str) -> str:
        self._check_kind(item, at)
        name = f"{at}: {item.kind}"
        data = read(item.blobs[0], name)
        width, height = media_files.image_size(data, f"{name} {item.blobs[0].shown}")
        try:
            counts = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
            return str(self.processor.replace_image_token({"num_soft_tokens_per_image": counts}, 0))
        except BridgeError:
            raise
        except Exception as error:
            raise DataError(f"{at}: the processor refuses its media ({_line(error)})") from error

    def _check_kind(self, item: Media, at: str) -> None:
        if item.kind not in self.kinds:
            raise DataError(f"{at}: the model in {self.folder} takes no {item.kind}")

    def _decode(self, item: Media, read: ReadMedia, at: str) -> Any:
        self._check_kind(item, at)
        name = f"{at}: {item.kind}"
        blobs = [read(blob, name) for blob in item.blobs]
        if len(blobs) == 1:
            name = f"{name} {item.blobs[0].shown}"
        if item.kind == "image":
            return media_files.decode_image(blobs[0], name)
        if item.kind == "audio":
            rate = int(self.processor.feature_extractor.sampling_rate)
            return media_files.decode_audio(blobs[0], rate, name)
        return media_files.decode_video(item, blobs, name)

    def _process(self, items: Sequence[Decoded], at: str) -> Any:
        """Run the processor over decoded media, and a text of placeholders for them."""
        text = "".join(PLACEHOLDERS[item.kind] for item, _ in items)
        images = [value for item, value in items if item.kind == "image"]
        sounds = [value for item, value in items if item.kind == "audio"]
        videos = [value for item, value in items if item.kind == "video"]
        given: dict[str, Any] = {"images": images or None, "audio": sounds or None}
        if videos:
            given["videos"] = [video.frames for video in videos]
            given["video_metadata"] = [
                {
                    "fps": video.fps,
                    "total_num_frames": len(video.frames),
                    "duration": len(video.frames) / video.fps,
                    "frames_indices": list(range(len(video.frames))),
                }
                for video in videos
            ]
            fewest = min(len(video.frames) for video in videos)
            if fewest < (getattr(self.processor.video_processor, "num_frames", None) or 0):
                given["videos_kwargs"] = {"num_frames": fewest}
        given = {key: value for key, value in given.items() if value is not None}
        try:
            return self.processor(
                text=[text],
                add_special_tokens=False,
                return_text_replacement_offsets=True,
                return_tensors="pt",
                **given,
            )
        except BridgeError:
            raise
        except Exception as error:
            raise DataError(f"{at}: the processor refuses its media ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
