"""Real excerpt: six seconds of recorded music from the stempeg package, with its stems."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from .song import SAMPLE_RATE, STEMS, Song

STREAMS = ("mixture", "drums", "bass", "other", "vocals")
"""Audio streams of the file, in order."""
VOCAL_SEGMENTS = ((0.04, 2.04), (3.88, 6.06))
"""Sung regions: 20 ms blocks with power less than 12 dB below the vocals' mean power; gaps under 0.2 s are closed."""


def excerpt() -> Song:
    """Real excerpt with stems: 6.08 s of "Falcon 69" by The Easton Ellises, from the stempeg package.

    The mixture is the sum of the stems, which differs from the file's own mixture. Samples may exceed 1.
    stempeg's README states the licence.

    Raises:
        ImportError: without the stempeg package. It is located but not imported, because its import requires ffmpeg.
    """
    spec = importlib.util.find_spec("stempeg")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the real excerpt is a file of the stempeg package, which is missing: "
            "pip install --no-deps stempeg, or the extra bsmamba2[book]"
        )
    paths = sorted(Path(spec.submodule_search_locations[0]).glob("data/*Falcon 69.stem.mp4"))
    if not paths:
        raise ImportError("this stempeg package has no Falcon 69 excerpt: pip install --no-deps stempeg==0.2.6")
    stems = torch.stack([_decode(paths[0], STREAMS.index(name)) for name in STEMS])
    return Song(
        name="falcon-69",
        stems=stems,
        sample_rate=SAMPLE_RATE,
        vocal_segments=VOCAL_SEGMENTS,
        licence="CC BY-NC-SA 3.0",
        source='"Falcon 69" by The Easton Ellises, excerpt carried by the stempeg package on PyPI',
    )


def _decode(path: Path, stream: int) -> torch.Tensor:
    """Decode one audio stream of a file, (c=2, t) float32."""
    import av

    with av.open(str(path)) as container:
        resampler = av.AudioResampler(format="fltp", layout="stereo", rate=SAMPLE_RATE)
        frames = container.decode(container.streams.audio[stream])
        pieces = [out.to_ndarray() for frame in frames for out in resampler.resample(frame)]
    return torch.from_numpy(np.concatenate(pieces, axis=1).astype(np.float32))
