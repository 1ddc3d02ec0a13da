"""Audio files for tests, whole, cut and damaged, and the files in a folder."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile


def wave(path: Path, rate: int = 8000, channels: int = 2, frames: int = 900, **options: object) -> Path:
    soundfile.write(path, np.full((frames, channels), 0.25), rate, **options)  # type: ignore[arg-type]
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def with_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def with_samples(path: Path, *values: float) -> Path:
    frames = np.zeros((90_000, 2))  # the bad sample lies in the second piece that is read
    frames[80_000, 1] = values[0]
    soundfile.write(path, frames, 8000, subtype="FLOAT")
    return path


def poke(path: Path, offset: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    return with_bytes(path, bytes(data))


def pipe(path: Path) -> Path:
    """A pipe that nobody writes to, in the place of a file if there is one."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def device(path: Path) -> Path:
    """A link to a device that never ends, in the place of a file if there is one."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def found_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def encode_tone(
    path: Path,
    codec: str,
    rate: int,
    channels: int = 2,
    *,
    video: bool = False,
    audio: np.ndarray | None = None,
    layout: str | None = None,
    format: str | None = None,
    **options: str,
) -> np.ndarray:
    """Write 100,001 samples of a tone in noise, or other audio, by FFmpeg's encoders; returns (c, samples) float32."""
    integer = codec in ("alac", "flac", "pcm_s16le", "pcm_s16be")
    sample_format = ("s16" if integer else "flt") + ("p" if codec in ("alac", "aac", "wmav2", "libmp3lame") else "")
    layout = layout or ("mono", "stereo")[channels - 1]
    if audio is None:
        audio = 0.3 * np.sin(2 * np.pi * 440 * np.arange(100_001) / rate) * np.ones((channels, 1))
        audio = audio + np.random.default_rng(0).normal(0, 0.02, audio.shape)
    audio = audio.astype("float32")
    samples = np.rint(audio * 32768).astype("int16") if integer else audio
    rounded = samples / np.float32(32768) if integer else audio
    samples = samples if sample_format.endswith("p") else samples.T.reshape(1, -1)
    with av.open(path, "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, format=sample_format)
        if not integer:
            stream.codec_context.bit_rate = 64_000 * channels
        if video:
            pictures = container.add_stream("mpeg4", rate=25, width=64, height=64, pix_fmt="yuv420p")
            for i in range(round(100_001 / rate * 25)):
                picture = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), "uint8"), format="rgb24")
                picture.pts = i
                container.mux(pictures.encode(picture))
            container.mux(pictures.encode(None))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format=sample_format, layout=layout)
        frame.rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return rounded
