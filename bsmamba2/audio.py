"""Audio files in and out: WAV, FLAC, OGG and MP3, through soundfile.

Book: "The whole model". Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor


class AudioError(ValueError):
    """A file that cannot be used: the message names it, says why, and what to do."""


def read(path: str | os.PathLike[str]) -> tuple[Tensor, int]:
    """A whole file: (c, samples) float32, and its rate in hertz.

    Raises:
        AudioError: for a file that is missing, no audio, empty, or holds NaN or infinite samples.
    """
    try:
        frames, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        reason = "does not exist" if not Path(path).exists() else f"cannot be read as audio ({error})"
        raise AudioError(f"{path}: {reason}; give a WAV, FLAC, OGG or MP3 file") from error
    if not len(frames):
        raise AudioError(f"{path}: holds no samples")
    if not np.isfinite(frames).all():
        raise AudioError(f"{path}: holds NaN or infinite samples; repair or export it again")
    return torch.from_numpy(frames.T.copy()), rate


def write(path: str | os.PathLike[str], audio: Tensor, sample_rate: int) -> None:
    """Write (c, samples) as 32-bit float WAV, which cannot clip; the file appears whole or not at all.

    Raises:
        AudioError: when it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        soundfile.write(part, audio.T.numpy(), sample_rate, format="WAV", subtype="FLOAT")
        part.replace(path)
    except (soundfile.LibsndfileError, OSError) as error:
        raise AudioError(f"{path}: cannot be written ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def convert(audio: Tensor, rate: int, new_rate: int, channels: int) -> Tensor:
    """(c, samples) at one rate → (channels, samples) at another; mono is copied to every channel.

    Raises:
        AudioError: when the channels are neither one nor as many as asked for.
    """
    if audio.shape[0] not in (1, channels):
        raise AudioError(f"{audio.shape[0]} channels: the model takes {channels}, or mono; mix the file down first")
    audio = audio.expand(channels, -1)
    return audio if rate == new_rate else torchaudio.functional.resample(audio, rate, new_rate)
