"""Pictures and sound from files, as the Hugging Face processors take them; what cannot be used says why in one line."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bridge.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

# Bytes of a sample of PCM -> its numpy type, what stands for silence, and the largest value.
_PCM = {1: ("u1", 128, 128.0), 2: ("<i2", 0, 32_768.0), 4: ("<i4", 0, 2_147_483_648.0)}


def load_image(path: str | Path) -> Image:
    """A picture in RGB, read to its end. Raises UsageError that names the file: missing, damaged, no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UsageError(f"{path}: not found") from None
    except UnidentifiedImageError:
        raise UsageError(f"{path}: is not an image that can be read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: cannot be read as an image ({error})") from None


def load_audio(path: str | Path, sampling_rate: int) -> np.ndarray:
    """A WAV file of integer PCM as float32 [samples] in -1..1, channels averaged.

    `sampling_rate` is the processor's (`processor.feature_extractor.sampling_rate`). Raises UsageError that names the
    file: missing, damaged, empty, of another rate or format. Nothing is resampled: that is a choice with a sound of its
    own.
    """
    try:
        with wave.open(str(path), "rb") as file:
            rate, channels, width, frames = (
                file.getframerate(),
                file.getnchannels(),
                file.getsampwidth(),
                file.getnframes(),
            )
            data = file.readframes(frames)
    except FileNotFoundError:
        raise UsageError(f"{path}: not found") from None
    except (OSError, EOFError, wave.Error, RuntimeError) as error:
        raise UsageError(f"{path}: cannot be read as a WAV file ({error or 'it ends too soon'})") from None
    if rate != sampling_rate:
        raise UsageError(f"{path}: has a sampling rate of {rate} Hz, the model takes {sampling_rate} Hz; resample it")
    if width not in _PCM:
        raise UsageError(f"{path}: has samples of {8 * width} bits; 8, 16 and 32 are supported")
    if len(data) != frames * channels * width or not frames:
        raise UsageError(f"{path}: holds {len(data)} bytes of sound, its header says {frames * channels * width}")
    kind, silence, largest = _PCM[width]
    samples = (np.frombuffer(data, dtype=kind).astype(np.float64) - silence) / largest
    return samples.reshape(frames, channels).mean(axis=1).astype(np.float32)
