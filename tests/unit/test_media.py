"""Files of pictures and sound: what is read, and the one line that says what is wrong with one that is not."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridge.errors import UsageError
from bridge.hf.media import load_audio, load_image


def write_wav(path: Path, samples: np.ndarray, rate: int = 16_000, channels: int = 1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


@pytest.mark.parametrize(("dtype", "largest"), [(np.int16, 32_767), (np.int32, 2**31 - 1)])
def test_audio_is_read_as_written(tmp_path: Path, dtype: type, largest: int) -> None:
    wanted = np.sin(np.arange(1000) / 7)
    path = write_wav(tmp_path / "a.wav", (wanted * largest).astype(dtype))
    np.testing.assert_allclose(load_audio(path, 16_000), wanted, atol=1e-4)


def test_channels_are_averaged(tmp_path: Path) -> None:
    stereo = np.stack([np.full(50, 1000), np.full(50, 3000)], axis=1).astype(np.int16)
    read = load_audio(write_wav(tmp_path / "a.wav", stereo, channels=2), 16_000)
    assert read.shape == (50,)
    np.testing.assert_allclose(read, 2000 / 32_768)


def test_an_image_is_read_in_rgb(tmp_path: Path) -> None:
    Image.new("LA", (6, 4), (10, 255)).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png")
    assert (image.mode, image.size) == ("RGB", (6, 4))


def test_bad_files_are_named(tmp_path: Path) -> None:
    tone = (np.sin(np.arange(4000)) * 9000).astype(np.int16)
    with pytest.raises(UsageError, match=r"a\.wav: has a sampling rate of 44100 Hz, the model takes 16000 Hz"):
        load_audio(write_wav(tmp_path / "a.wav", tone, rate=44_100), 16_000)
    good = write_wav(tmp_path / "b.wav", tone)
    good.write_bytes(good.read_bytes()[:-1001])
    with pytest.raises(UsageError, match=r"b\.wav: "):
        load_audio(good, 16_000)
    for content in (b"", b"RIFF", b"no sound at all" * 9):
        (tmp_path / "c.wav").write_bytes(content)
        with pytest.raises(UsageError, match=r"c\.wav: cannot be read as a WAV file"):
            load_audio(tmp_path / "c.wav", 16_000)
    with pytest.raises(UsageError, match=r"d\.wav: not found"):
        load_audio(tmp_path / "d.wav", 16_000)

    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"a\.png: cannot be read as an image"):
        load_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture at all")
    with pytest.raises(UsageError, match=r"b\.png: is not an image"):
        load_image(tmp_path / "b.png")
    with pytest.raises(UsageError, match=r"c\.png: not found"):
        load_image(tmp_path / "c.png")
