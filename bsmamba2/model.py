"""BSMamba2: audio in, stems out.

audio → spectrogram → bands → (time, band) × L → norm → masks × spectrogram → audio

Book: "The whole model". Source: E. Kim and Y.-H. Choi, "Mamba2 Meets Silence", arXiv:2508.14556,
and the authors' published code. Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import kernels, ssd
from .bands import BandSplit, UnitNorm
from .config import ModelConfig
from .dual_path import DualPath, SequenceLayer
from .mamba2 import Mamba2
from .masks import MaskEstimator
from .spectrogram import istft, stft


class BSMamba2(nn.Module):
    """The band-split Mamba-2 separator.

    Args:
        config: the architecture; `ModelConfig()` is the published one.
        scan: "auto" (by the device of the input), "recurrent", "matrix", "chunked" or "fused", see
            `bsmamba2.kernels`; or any function with the signature in `bsmamba2.ssd`.
        sequence_layer: makes the layer that reads a sequence in one direction, (b, length, d) to the
            same; a Mamba-2 mixer of the configuration's size when absent. This is the seam for
            ablations: pass one that makes an LSTM or attention.

    Attributes:
        checkpointing: while gradients are recorded, keep only the input of each dual-path layer and compute
            the layer again in the backward pass: less memory, more time, the same gradients.

    Raises:
        ValueError: for another name of a scan, or heads that do not fill the inner width.
        kernels.BackendError: for "fused" on a machine that cannot run it.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        scan: ssd.Scan | str = "auto",
        sequence_layer: SequenceLayer | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        mixer = partial(
            Mamba2,
            config.dim,
            state=config.state,
            head_width=config.head_width,
            expand=config.expand,
            conv_width=config.conv_width,
            scan=kernels.choose(scan),
        )
        self.band_split = BandSplit(config.bands, config.channels, config.dim)
        self.layers = nn.ModuleList(DualPath(config.dim, sequence_layer or mixer) for _ in range(config.layers))
        self.final_norm = UnitNorm(config.dim)
        self.mask_estimators = nn.ModuleList(
            MaskEstimator(config.bands, config.channels, config.dim, config.mask_expand) for _ in config.stems
        )

    def forward(self, mixture: Tensor) -> Tensor:
        """Separate audio.

        Args:
            mixture: (b, c, samples), more than n_fft // 2 samples.

        Returns:
            (b, stem, c, samples).

        Raises:
            ValueError: for another number of axes or channels, or too few samples.
        """
        if mixture.dim() != 3 or mixture.shape[1] != self.config.channels:
            raise ValueError(f"mixture {tuple(mixture.shape)} must be (b, c={self.config.channels}, samples)")
        n_fft, hop = self.config.n_fft, self.config.hop
        spectrogram = stft(mixture, n_fft, hop)
        stems = self.apply_to_spectrogram(spectrogram)
        return istft(stems, mixture.shape[-1], n_fft, hop)

    def apply_to_spectrogram(self, spectrogram: Tensor) -> Tensor:
        """Separate a spectrogram: complex (b, c, f, t) → complex (b, stem, c, f, t).

        Raises:
            ValueError: when the channels or bins are not the configuration's.
        """
        expected = (self.config.channels, self.config.bins)
        if spectrogram.dim() != 4 or spectrogram.shape[1:3] != expected:
            raise ValueError(f"spectrogram {tuple(spectrogram.shape)} must be (b, c={expected[0]}, f={expected[1]}, t)")
        return self.masks(spectrogram) * spectrogram[:, None]

    def masks(self, spectrogram: Tensor) -> Tensor:
        """The complex masks of a spectrogram: (b, c, f, t) → (b, stem, c, f, t)."""
        x = self.band_split(spectrogram)  # (b, t, k, d)
        recompute = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        x = self.final_norm(x)
        return torch.stack([estimator(x) for estimator in self.mask_estimators], dim=1)
