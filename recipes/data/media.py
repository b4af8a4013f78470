"""Bytes of media -> what the processors take: RGB images, mono waveforms, frames with their times.

Paths are relative to the data file's folder (or `media_root`) and stay inside it, links followed. A URL is fetched only
where that was allowed. Nothing but decoders of plain raster and sound formats is ever let near the bytes.
"""

from __future__ import annotations

import importlib
import io
import math
import stat
import tempfile
import urllib.error
import urllib.request
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import DataError, UsageError
from recipes.data.sample import Blob, Media

# Pillow also knows formats that start other programs (EPS); these are the ones that people train on.
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# How a file of a format shows at its end that it is whole.
_ENDS: dict[str, Callable[[bytes], bool]] = {
    "PNG": lambda data: data.endswith(b"IEND\xaeB`\x82"),
    "JPEG": lambda data: data.rstrip(b"\0").endswith(b"\xff\xd9"),
    "GIF": lambda data: data.endswith(b"\x3b"),
    "WEBP": lambda data: int.from_bytes(data[4:8], "little") + 8 == len(data),
}
_ORIENTATION = 0x0112
# Chunks of a PNG in which Pillow looks for an orientation.
_TURNED_PNG = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
# Where Pillow begins to warn of files that are small and pictures that are not.
_MAX_PIXELS = 89_478_485
_MAX_BYTES = 1 << 30
_MAX_URL_BYTES = 256 << 20
_URL_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Video:
    """Decoded frames [t, h, w, 3] uint8 and how many of them a second has."""

    frames: np.ndarray
    fps: float


def read_blob(blob: Blob, root: Path | None, *, allow_urls: bool, at: str) -> bytes:
    """The bytes of a blob. Raises DataError: not there, outside of `root`, too large, a URL that is not allowed."""
    if blob.data is not None:
        return blob.data
    if blob.url is not None:
        if not allow_urls:
            raise DataError(f"{at}: {blob.url}: a URL, which is only fetched with data.allow_urls=true")
        return _fetch(blob.url, at)
    assert blob.path is not None
    path = _inside(blob.path, root, at)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{at}: {blob.path}: not a file")
        if info.st_size > _MAX_BYTES:
            raise DataError(f"{at}: {blob.path}: larger than {_MAX_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{at}: {blob.path}: {(error.strerror or 'cannot be read').lower()}") from None


def _inside(name: str, root: Path | None, at: str) -> Path:
    if root is None:
        raise DataError(f"{at}: {name}: a path, but this data has no folder; set data.media_root")
    folder = root.resolve()
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError):
        raise DataError(f"{at}: {name}: not a path that can be followed") from None
    if not path.is_relative_to(folder):
        raise DataError(f"{at}: {name}: outside of {root}; set data.media_root to a folder that holds it")
    return path


def _fetch(url: str, at: str) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "gemma4-bridge"})
        with urllib.request.urlopen(request, timeout=_URL_TIMEOUT_S) as response:
            data: bytes = response.read(_MAX_URL_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DataError(f"{at}: {url}: {error}") from None
    if len(data) > _MAX_URL_BYTES:
        raise DataError(f"{at}: {url}: larger than {_MAX_URL_BYTES >> 20} MiB")
    return data


def decode_image(data: bytes, at: str) -> Any:
    """An RGB `PIL.Image`, turned as its EXIF says. Raises DataError for what is no image, or one too large."""
    return _frames_of(data, at, only_first=True)[0][0]


def image_size(data: bytes, at: str) -> tuple[int, int]:
    """Width and height of what `decode_image` gives, of the header where that says all there is to know.

    A file whose end does not show that it is whole is decoded. Raises DataError.
    """
    image_module, _ = _pillow(at)
    try:
        with image_module.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as opened:
            whole = _ENDS.get(opened.format)
            # To look for how it is turned Pillow reads a PNG to its end.
            told = opened.format == "PNG" and any(word in data for word in _TURNED_PNG)
            if whole is not None and whole(data) and not told and opened.width * opened.height <= _MAX_PIXELS:
                turned = opened.format != "PNG" and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                return (opened.height, opened.width) if turned else (opened.width, opened.height)
    except Exception:
        # As in `_frames_of`, which says what it is.
        pass
    size: tuple[int, int] = decode_image(data, at).size
    return size


def _frames_of(data: bytes, at: str, *, only_first: bool) -> tuple[list[Any], list[float]]:
    """RGB frames, and how many milliseconds each is shown (0 where the file does not say)."""
    image_module, operations = _pillow(at)
    images, durations = [], []
    try:
        with image_module.open(io.BytesIO(data), formats=_IMAGE_FORMATS) as opened:
            if opened.width * opened.height > _MAX_PIXELS:
                raise ValueError(f"{opened.width} × {opened.height} pixels are too many")
            for index in range(1 if only_first else getattr(opened, "n_frames", 1)):
                opened.seek(index)
                opened.load()
                images.append(operations.exif_transpose(opened).convert("RGB"))
                durations.append(float(opened.info.get("duration", 0)))
    except Exception as error:
        # Damaged files make Pillow raise nearly everything: OSError, SyntaxError, ValueError, struct.error ...
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, image_module.UnidentifiedImageError):
            message = f"not one of {', '.join(_IMAGE_FORMATS)}"
        raise DataError(f"{at}: not an image that can be read ({message})") from None
    return images, durations


def _pillow(at: str) -> tuple[Any, Any]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise UsageError(f"{at}: images need the Python package Pillow: pip install pillow") from None
    return Image, ImageOps


def decode_audio(data: bytes, sampling_rate: int, at: str) -> np.ndarray:
    """A mono waveform [samples] float32 in [-1, 1] of a WAV file (or what `soundfile` reads, where installed).

    Resampled to the model's `sampling_rate` (Hz). Raises DataError.
    """
    if data[:4] == b"RIFF":
        samples, rate = _wav(data, at)
    else:
        try:
            soundfile = importlib.import_module("soundfile")
        except ImportError:
            raise DataError(f"{at}: not a WAV file; other sound files need the Python package soundfile") from None
        try:
            samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        except Exception as error:
            raise DataError(f"{at}: not a sound file that can be read ({error})") from None
    if not len(samples):
        raise DataError(f"{at}: holds no sound")
    mono: np.ndarray = samples.mean(axis=1, dtype=np.float32)
    return mono if rate == sampling_rate else resampled(mono, rate, sampling_rate)


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples [n] float32 at `rate` Hz -> [n · wanted / rate, rounded up], by a sinc of 16 zero crossings a side under
    a Kaiser window, which keeps 95 % of what the lower of the two rates can hold."""
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    # Of the low pass, in cycles a sample of the input; the filter reaches `reach` samples to either side.
    cutoff = 0.95 * min(1.0, up / down)
    reach = math.ceil(16 / cutoff)
    # Row p: the weights of the input around the p-th of every `up` samples, which repeat after `down` of the input.
    at = np.arange(up)[:, None] * down / up - np.arange(-reach, down + reach)[None, :]
    window = np.i0(12 * np.sqrt(np.clip(1 - (at / reach) ** 2, 0, 1))) / np.i0(12)
    weights = (cutoff * np.sinc(cutoff * at) * window * (np.abs(at) <= reach)).astype(np.float32)
    blocks = -(-len(samples) // down)
    padded = np.pad(samples, (reach, blocks * down - len(samples) + reach))
    taken = np.lib.stride_tricks.sliding_window_view(padded, down + 2 * reach)[::down][:blocks]
    # A few seconds at a time: the product makes a copy of what the windows overlap in.
    parts = [taken[start : start + 4096] @ weights.T for start in range(0, blocks, 4096)]
    result: np.ndarray = np.concatenate(parts).reshape(-1)[: -(-len(samples) * up // down)]
    return result


def _wav(data: bytes, at: str) -> tuple[np.ndarray, int]:
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError, RuntimeError) as error:
        raise DataError(f"{at}: not a PCM WAV file ({error or 'cut short'})") from None
    if len(raw) % (width * channels):
        raise DataError(f"{at}: not a PCM WAV file (cut short)")
    if width == 1:
        values = np.frombuffer(raw, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        bytes3 = np.frombuffer(raw, np.uint8).reshape(-1, 3).astype(np.int32)
        whole = bytes3[:, 0] << 8 | bytes3[:, 1] << 16 | bytes3[:, 2] << 24
        values = whole.astype(np.float32) / 2**31
    else:
        kind = np.dtype(f"<i{width}")
        values = np.frombuffer(raw, kind).astype(np.float32) / 2 ** (8 * width - 1)
    return values.reshape(-1, channels), rate


def decode_video(media: Media, blobs: list[bytes], at: str) -> Video:
    """Frames of a video: a list of images, an animated GIF or WebP, or what transformers' decoders read.

    Raises DataError.
    """
    if media.fps is not None:
        frames = [decode_image(data, f"{at}: frame {index}") for index, data in enumerate(blobs)]
        return Video(_stacked(frames, at), media.fps)
    data = blobs[0]
    if data[:3] == b"GIF" or data[8:12] == b"WEBP":
        frames, durations = _frames_of(data, at, only_first=False)
        seconds = sum(durations) / 1000
        return Video(_stacked(frames, at), len(frames) / seconds if seconds else 10.0)
    return _with_transformers(data, at)


def _stacked(frames: list[Any], at: str) -> np.ndarray:
    if len({frame.size for frame in frames}) != 1:
        raise DataError(f"{at}: frames of different sizes")
    return np.stack([np.asarray(frame) for frame in frames])


def _with_transformers(data: bytes, at: str) -> Video:
    from transformers.video_utils import load_video

    failures = []
    with tempfile.NamedTemporaryFile(suffix=".mp4") as file:
        file.write(data)
        file.flush()
        for backend in ("torchcodec", "pyav", "decord", "opencv"):
            try:
                frames, metadata = load_video(file.name, backend=backend)
            except ImportError:
                continue
            except Exception as error:
                failures.append(f"{backend}: {(str(error).splitlines() or [type(error).__name__])[0]}")
                continue
            array = np.asarray(frames)
            if array.ndim == 4 and array.shape[1] == 3 and array.shape[-1] != 3:
                array = array.transpose(0, 2, 3, 1)
            return Video(array, float(metadata.fps or 24))
    if failures:
        raise DataError(f"{at}: not a video that can be read ({failures[0]})")
    raise UsageError(
        f"{at}: decoding this video needs torchcodec, PyAV, decord or OpenCV; "
        "GIF, WebP and lists of frames need only Pillow"
    )
