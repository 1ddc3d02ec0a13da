"""BSMamba2: audio in, stems out.

audio → spectrogram → bands → (time, band) × L → norm → masks × spectrogram → audio

Book: "The whole model". Source: E. Kim and Y.-H. Choi, "Mamba2 Meets Silence", arXiv:2508.14556,
and the authors' published code. Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import ssd
from .bands import BandSplit, UnitNorm
from .config import ModelConfig
from .dual_path import DualPath, SequenceLayer
from .mamba2 import Mamba2, MixerState
from .masks import MaskEstimator
from .spectrogram import istft, stft

StreamingState = list[MixerState]
"""Recurrent state of a model between two segments of a song: for each layer, the state of its forward time mixer."""


class BSMamba2(nn.Module):
    """The band-split Mamba-2 separator.

    Args:
        config: the architecture; `ModelConfig()` is the published one.
        scan: "recurrent", "matrix", "chunked", or any function with the signature in `bsmamba2.ssd`.
        sequence_layer: creates the layer that reads a sequence in one direction, (b, length, d) → (b, length, d);
            by default a Mamba-2 mixer of the configuration's size. For ablations, pass a function that creates an
            LSTM or attention layer.

    Attributes:
        gradient_checkpointing: while gradients are recorded, keep only the input of each dual-path layer and recompute
            the layer in the backward pass. This needs less memory and more time for the same gradients.

    Raises:
        ValueError: for an unknown scan name, or if the inner width is not a multiple of headdim.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        scan: ssd.Scan | str = ssd.chunked,
        sequence_layer: SequenceLayer | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        mixer = partial(
            Mamba2,
            config.dim,
            d_state=config.d_state,
            headdim=config.headdim,
            expand=config.expand,
            d_conv=config.d_conv,
            scan=ssd.resolve_scan(scan),
        )
        self.band_split = BandSplit(config.freqs_per_bands, config.channels, config.dim)
        self.layers = nn.ModuleList(DualPath(config.dim, sequence_layer or mixer) for _ in range(config.depth))
        self.final_norm = UnitNorm(config.dim)
        self.mask_estimators = nn.ModuleList(
            MaskEstimator(config.freqs_per_bands, config.channels, config.dim, config.mask_expand) for _ in config.stems
        )

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate audio.

        Args:
            mixture: (b, c, samples), more than n_fft // 2 samples.

        Returns:
            (b, stem, c, samples).

        Raises:
            ValueError: for a wrong number of axes or channels, or too few samples.
        """
        if mixture.dim() != 3 or mixture.shape[1] != self.config.channels:
            raise ValueError(f"mixture {tuple(mixture.shape)} must be (b, c={self.config.channels}, samples)")
        lengths = self.config.n_fft, self.config.hop_length, self.config.win_length
        stems = self.apply_to_spectrogram(stft(mixture, *lengths))
        return istft(stems, mixture.shape[-1], *lengths)

    def apply_to_spectrogram(self, spectrogram: Tensor) -> Tensor:
        """Estimate the masks of a spectrogram and apply them: complex (b, c, f, t) → complex (b, stem, c, f, t).

        Raises:
            ValueError: if the channels or bins do not match the configuration.
        """
        expected = (self.config.channels, self.config.bins)
        if spectrogram.dim() != 4 or spectrogram.shape[1:3] != expected:
            raise ValueError(f"spectrogram {tuple(spectrogram.shape)} must be (b, c={expected[0]}, f={expected[1]}, t)")
        return self.masks(spectrogram) * spectrogram[:, None]

    def masks(self, spectrogram: Tensor) -> Tensor:
        """Estimate the complex masks of a spectrogram: (b, c, f, t) → (b, stem, c, f, t)."""
        x = self.band_split(spectrogram)  # (b, t, k, d)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        x = self.final_norm(x)
        return torch.stack([estimator(x) for estimator in self.mask_estimators], dim=1)

    def stream_masks(
        self, spectrogram: Tensor, state: StreamingState | None, frames: int
    ) -> tuple[Tensor, StreamingState]:
        """Estimate the complex masks of one segment of a song, continuing from the previous segment.

        Along time, the forward direction depends on the whole past through its state; the backward direction sees the
        future only up to the end of the look-ahead. The returned state belongs to the end of the segment, not of the
        look-ahead, because the look-ahead frames are read again with the next segment and more of their future.

        Args:
            spectrogram: complex (b, c, f, t): the segment, followed by its look-ahead.
            state: state returned for the previous segment; None at the start of a song.
            frames: number of frames in the segment, from 1 to t.

        Returns:
            Masks (b, stem, c, f, frames), and the state for the next segment.

        Raises:
            ValueError: if `frames` is out of range, or a layer cannot carry over a state.
        """
        if not 0 < frames <= spectrogram.shape[-1]:
            raise ValueError(f"frames={frames} must be from 1 to the {spectrogram.shape[-1]} of the spectrogram")
        x = self.band_split(spectrogram)  # (b, t, k, d)
        states: StreamingState = []
        for i, layer in enumerate(cast("list[DualPath]", self.layers)):
            x, after = layer.step(x, state[i] if state else None, frames)
            states.append(after)
        x = self.final_norm(x[:, :frames])
        return torch.stack([estimator(x) for estimator in self.mask_estimators], dim=1), states
