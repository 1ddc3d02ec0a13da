"""Evaluation: scores of a model on one song, and of a checkpoint on many tracks under a named protocol.

It contains the protocols and published figures (`protocols`), the evaluation itself (`evaluate`), and its tables and
files (`report`). It needs a model and songs with known stems: synthesised ones, or a folder in MUSDB18-HQ's layout.
Begin with `score` for one song, or with `evaluate.run` for a checkpoint, as the command `bsmamba2 evaluate` does.
Book: "Measuring".
"""

from .evaluate import EvalRow, EvalSet, EvalTrack, Failure, load_tracks, mean, score, tracks_of
from .protocols import PROTOCOLS, EvalProtocol, compare
from .report import Evaluation

__all__ = [
    "PROTOCOLS", "EvalProtocol", "EvalRow", "EvalSet", "EvalTrack", "Evaluation", "Failure", "compare", "load_tracks",
    "mean", "score", "tracks_of",
]  # fmt: skip
