"""Evaluation report: rows averaged over tracks, tables, and the files `evaluation.json` and `rows.csv`.

rows → mean, median → tables by segment length and by vocal occupancy, and a comparison with published figures

Book: "Measuring".
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..atomic_write import write_atomically
from .evaluate import METRICS, EvalRow, EvalSet, Failure, to_json
from .protocols import EvalProtocol, compare


@dataclass(frozen=True)
class Average:
    """Mean and median of one metric over the tracks without NaN; NaN if there are none."""

    mean: float
    median: float
    tracks: int


def average(rows: Sequence[EvalRow], metric: str) -> Average:
    """Average one of the `METRICS` over rows. The mean is NaN when both infinities are among the values."""
    values = [value for row in rows if not math.isnan(value := getattr(row, metric))]
    if not values:
        return Average(math.nan, math.nan, 0)
    undefined = math.inf in values and -math.inf in values
    mean = math.nan if undefined else math.fsum(values) / len(values)
    return Average(mean, statistics.median(values), len(values))


def by_occupancy(rows: Sequence[EvalRow], stem: str = "vocals") -> dict[str, list[EvalRow]]:
    """Group rows of one stem by occupancy: zero, then quarters with the upper bound included; groups may be empty."""
    groups = {f"no {stem}": [row for row in rows if row.occupancy <= 0]}
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)):
        groups[f"{low:.0%} – {high:.0%}"] = [row for row in rows if low < row.occupancy <= high]
    return groups


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Results of an evaluation."""

    checkpoint: str  #: the file's name
    checkpoint_sha256: str  #: its `sha256_file`
    tracks: EvalSet
    protocol: EvalProtocol
    dtype: str  #: type of the model's arithmetic
    rows: tuple[EvalRow, ...]  #: rows of all segment lengths and stems
    failures: tuple[Failure, ...] = ()  #: tracks without a row

    @property
    def default_rows(self) -> list[EvalRow]:
        """The rows at the protocol's own segment length."""
        return [row for row in self.rows if row.segment == self.protocol.segment]

    @property
    def segments(self) -> list[float]:
        """The segment lengths, in seconds, ascending."""
        return sorted({row.segment for row in self.rows})

    @property
    def stems(self) -> list[str]:
        """The names of the stems, in the model's order."""
        return list(dict.fromkeys(row.stem for row in self.rows))

    def at(self, segment: float, stem: str = "vocals") -> list[EvalRow]:
        """The rows of one stem at one segment length, in seconds."""
        return [row for row in self.rows if (row.segment, row.stem) == (segment, stem)]

    def _groups(self, split: Callable[[str], dict[str, list[EvalRow]]]) -> dict[str, list[EvalRow]]:
        """The non-empty groups of each stem's rows; names begin with the stem, unless `vocals` is the only one."""
        lead = {stem: "" if self.stems == ["vocals"] else f"{stem}, " for stem in self.stems}
        return {lead[stem] + name: rows for stem in self.stems for name, rows in split(stem).items() if rows}

    def by_segment(self) -> dict[str, list[EvalRow]]:
        """The rows of each stem and segment length."""
        return self._groups(lambda stem: {f"{segment:g} s": self.at(segment, stem) for segment in self.segments})

    def _table(self, groups: dict[str, list[EvalRow]]) -> list[dict[str, Any]]:
        """One line per group: mean or median over tracks, as in the protocol."""
        return [
            {"": name, "tracks": len(rows)}
            | {metric: getattr(average(rows, metric), self.protocol.over_tracks) for metric in METRICS}
            for name, rows in groups.items()
        ]

    def segment_table(self) -> list[dict[str, Any]]:
        """One line per stem and segment length."""
        return self._table(self.by_segment())

    def occupancy_table(self) -> list[dict[str, Any]]:
        """One line per stem and occupancy group, at the protocol's segment length."""
        return self._table(self._groups(lambda stem: by_occupancy(self.at(self.protocol.segment, stem), stem)))

    def comparison_table(self) -> list[dict[str, Any]]:
        """Two lines for this model's vocals, then one per published model; figures only if the protocol is the same."""
        rows = self.at(self.protocol.segment)
        missing = len(self.tracks.tracks) - len(rows)
        tracks = f"{self.tracks.name} but {missing} that failed" if missing else self.tracks.name
        lines: list[dict[str, Any]] = []
        for kind in ("mean", "median"):
            figures = {metric: getattr(average(rows, metric), kind) for metric in ("csdr", "usdr")}
            model = f"{self.checkpoint}, {kind} over {len(rows)} tracks"
            lines.append({"model": model, **figures, "protocol": f"{self.protocol.name}: {tracks}"})
        for comparison in compare(tracks, self.protocol):
            published = comparison.published
            figures = {"csdr": published.csdr, "usdr": published.usdr}
            text = "the same"
            if comparison.differs:
                reported = [f"{value:.2f} dB {key[0]}SDR" for key, value in figures.items() if value is not None]
                text = f"not comparable: {'; '.join(comparison.differs)}; {' and '.join(reported)} reported"
                figures = dict.fromkeys(figures)
            note = f" ({comparison.note})" if comparison.note else ""
            lines.append({"model": published.model, **figures, "protocol": text + note})
        return lines if "vocals" in self.stems or not self.stems else []

    def save(self, output: str | os.PathLike[str]) -> list[Path]:
        """Write `evaluation.json` and `rows.csv` into an existing folder; returns their paths.

        NaN is null in the JSON, and an empty cell in the CSV; the infinities are "inf" and "-inf".
        """
        content = {
            "checkpoint": {"file": self.checkpoint, "sha256": self.checkpoint_sha256},
            "tracks": {"name": self.tracks.name, "names": [track.name for track in self.tracks.tracks]},
            "protocol": asdict(self.protocol),
            "dtype": self.dtype,
            "averages": {
                name: {metric: asdict(average(rows, metric)) for metric in METRICS}
                for name, rows in self.by_segment().items()
            },
            "by_occupancy": self.occupancy_table(),
            "comparison": self.comparison_table(),
            "failures": [asdict(failure) for failure in self.failures],
            "rows": [asdict(row) for row in self.rows],
        }
        table = io.StringIO()
        writer = csv.DictWriter(table, [field.name for field in dataclasses.fields(EvalRow)], lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({key: "" if value != value else value for key, value in asdict(row).items()})
        paths = [Path(output) / "evaluation.json", Path(output) / "rows.csv"]
        for path, text in zip(paths, (to_json(content), table.getvalue()), strict=True):
            write_atomically(path, text)
        return paths
