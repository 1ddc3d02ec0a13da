"""Plotting, audio players, tables and source listings for the book's notebooks.

Every figure function returns a matplotlib Figure that a notebook displays; the methods that a chapter teaches are
elsewhere in the package. Needs the extra `book` (matplotlib, IPython). Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import itertools
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import soundfile
import torch
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D
from torch import Tensor
from tqdm import tqdm

from ..spectrogram import stft
from .picture import COLOURS, STYLE, Picture


@contextmanager
def _figure(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> Iterator[tuple[Figure, np.ndarray]]:
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(width, height))
        yield figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def source(*objects: Callable[..., Any]) -> Markdown:
    """Source code of functions or classes as Markdown, each under the path of its file."""
    parts = []
    for item in objects:
        name = getattr(inspect.getmodule(item), "__name__", "?").replace(".", "/") + ".py"
        parts.append(f"`{name}`\n\n```python\n{textwrap.dedent(inspect.getsource(item)).rstrip()}\n```")
    return Markdown("\n\n".join(parts))


def audio(signals: Mapping[str, Tensor], sample_rate: int = 44_100) -> HTML:
    """Audio players for signals (c, samples) by label, embedded as MP3.

    One factor scales all signals, so that their levels remain comparable. The book's pages combine several signals of
    equal length into one player (`book/_static/player.js`).

    Raises:
        ValueError: if a sample is NaN or infinite.
    """
    peak = max(float(signal.abs().max()) for signal in signals.values())
    if not np.isfinite(peak):
        raise ValueError("a signal to play holds NaN or infinite samples")
    players = []
    for label, signal in signals.items():
        name, address = html.escape(label), sound(signal, sample_rate, gain=0.9 / max(peak, 1e-9), compression=None)
        players.append(
            f'<figure class="player"><figcaption>{name}</figcaption>'
            f'<audio controls preload="metadata" aria-label="{name}" src="{address}"></audio></figure>'
        )
    group = "stems" if len({signal.shape[-1] for signal in signals.values()}) == 1 < len(signals) else "signals"
    return HTML(f'<div class="{group}">{"".join(players)}</div>')


def thumbnail(signal: Tensor, sample_rate: int = 44_100, *, top: float = 8_000.0, loudest: float | None = None) -> str:
    """Small spectrogram of (c, samples) without axes, 0 to `top` hertz, as a PNG in a `data:` URL.

    `loudest` is the power that is drawn brightest; by default the power of the loudest bin.
    """
    n_fft, hop_length = 2048, 1764
    power = stft(signal, n_fft, hop_length).abs().square().mean(0)[: int(top / sample_rate * n_fft)]
    level = 10 * torch.log10(power / max(loudest or float(power.max()), 1e-9) + 1e-9)
    small = torch.nn.functional.adaptive_max_pool2d(level[None], (72, level.shape[1]))[0]
    file = io.BytesIO()
    matplotlib.image.imsave(file, small.flip(0).numpy(), vmin=-80, vmax=0, cmap="magma", format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def sound(signal: Tensor, sample_rate: int = 44_100, *, gain: float = 1.0, compression: float | None = 0.6) -> str:
    """Signal (c, samples), times `gain`, as MP3 in a `data:` URL.

    A `compression` of 0 gives the largest file, 1 the smallest; None leaves the choice to the encoder.
    """
    file = io.BytesIO()
    frames = (signal.detach().cpu() * gain).T.numpy()
    soundfile.write(file, frames, sample_rate, format="MP3", compression_level=compression)
    return f"data:audio/mpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def progress(iterable: Iterable[Any], total: int, label: str, unit: str = "step") -> Iterator[Any]:
    """Progress bar for an iterable; it leaves only one line in a stored notebook."""
    yield from tqdm(iterable, total=total, desc=label, unit=unit, file=_Line(), mininterval=1, ascii=False, ncols=88)


class _Line(io.TextIOBase):
    """Text file of one line, which each write replaces in the same place of a notebook."""

    def __init__(self) -> None:
        self.handle = display(HTML("<pre></pre>"), display_id=True)

    def write(self, text: str) -> int:
        line = text.replace("\r", "").replace("\n", "")
        if line.strip() and self.handle is not None:
            self.handle.update(HTML(f"<pre>{html.escape(line)}</pre>"))
        return len(text)


def decibels(spectrogram: Tensor, floor: float = -80.0) -> Tensor:
    """Decibels: 20 · log10(modulus / largest modulus), at least `floor`; any shape, real or complex."""
    modulus = spectrogram.abs()
    return (20 * torch.log10(modulus / modulus.max().clamp(min=1e-12) + 1e-12)).clamp(min=floor)


def spectrograms(
    signals: Mapping[str, Tensor],
    sample_rate: int = 44_100,
    *,
    top: float = 1e4,
    n_fft: int = 2048,
    hop_length: int = 441,
) -> Figure:
    """Spectrograms of signals (c, samples) by label, up to `top` hertz; 0 dB is the loudest bin of all signals.

    The figure shows the mean power of the channels; `n_fft` and `hop_length` are in samples.
    """
    power = {label: stft(signal, n_fft, hop_length).abs().square().mean(0) for label, signal in signals.items()}
    loudest = max(float(values.max()) for values in power.values())
    bins = int(top / sample_rate * n_fft)
    with _figure(len(signals), 1, 7.5, 2.2 * len(signals), sharex=True) as (figure, axes):
        for axis, (label, values) in zip(axes[:, 0], power.items(), strict=True):
            level = 10 * torch.log10(values[:bins] / loudest + 1e-9)
            extent = (0, values.shape[1] * hop_length / sample_rate, 0, top / 1000)
            image = axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=-80, vmax=0)
            axis.set(title=label, ylabel="frequency (kHz)")
        axes[-1, 0].set_xlabel("time (s)")
        figure.colorbar(image, ax=axes[:, 0].tolist(), label="level (dB)")
    return figure


def lines(
    series: Mapping[str, tuple[Any, Any]], xlabel: str, ylabel: str, *, height: float = 3.0, **limits: Any
) -> Figure:
    """Line plot of several curves; `limits` are passed to matplotlib's Axes.set (xscale, ylim, …)."""
    points = {label: tuple(pair) for label, pair in series.items()}  # a zip can be read only once
    with _figure(1, 1, 7.5, height) as (figure, axes):
        for style, (label, (x, y)) in zip(itertools.cycle(("-", "--", "-.", ":")), points.items(), strict=False):
            axes[0, 0].plot(x, y, style, label=label)
        if all(isinstance(x, range) for x, _ in points.values()):
            axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, 0].set(xlabel=xlabel, ylabel=ylabel, **limits)
        if len(series) > 1:
            axes[0, 0].legend(frameon=False)
    return figure


def scores(
    rows: Sequence[Any], across: str, xlabel: str, metrics: Mapping[str, str], *, ticks: Sequence[float] = ()
) -> Figure:
    """Scatter plot of scores: one point per row, one panel per metric; NaN and infinite values are left out.

    `across` names the attribute of a row along x; `metrics` maps the attributes along y to their labels. If x takes
    only a few values, pass them as `ticks`: the x axis becomes logarithmic, and a line connects the means.
    """
    with _figure(len(metrics), 1, 7.5, 2.3 * len(metrics), sharex=True) as (figure, axes):
        for axis, (metric, label), colour in zip(axes[:, 0], metrics.items(), itertools.cycle(COLOURS), strict=False):
            points = np.array([(getattr(row, across), getattr(row, metric)) for row in rows], float).reshape(-1, 2)
            x, y = points[np.isfinite(points[:, 1])].T
            axis.plot(x, y, "o", color=colour, alpha=0.5, label="a track")
            if ticks:
                axis.plot(np.unique(x), [y[x == tick].mean() for tick in np.unique(x)], "-", color=colour, label="mean")
                axis.set_xscale("log")
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.minorticks_off()
                axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
            axis.set_ylabel(label)
        axes[-1, 0].set_xlabel(xlabel)
    return figure


def bars(values: Mapping[str, Sequence[float]], xlabel: str, *, mark: float | None = None) -> Figure:
    """Horizontal bar chart of medians, each with a line from the smallest to the largest value, and a mark along x."""
    with _figure(1, 1, 7.5, 0.5 + 0.24 * len(values)) as (figure, axes):
        for (name, some), colour in zip(values.items(), itertools.cycle(COLOURS[:2]), strict=False):
            middle = float(np.median(some))
            axes[0, 0].barh(name, middle, color=colour, alpha=0.6)
            axes[0, 0].plot((min(some), max(some)), (name, name), color="black", linewidth=1.5)
        axes[0, 0].invert_yaxis()
        axes[0, 0].set_xlabel(xlabel)
        if mark is not None:
            axes[0, 0].axvline(mark, color="black", linestyle=":", linewidth=1)
    return figure


def images(
    arrays: Mapping[str, Any], xlabel: str, ylabel: str, *, colour_label: str = "", height: float = 3.2, **options: Any
) -> Figure:
    """Heat maps side by side with one scale and one colour bar; row 0 is on top unless `origin="lower"`.

    `options` are passed to matplotlib's imshow; without `vmin` and `vmax` the scale covers all values.
    """
    panels = {label: np.asarray(array) for label, array in arrays.items()}
    scale = {
        "vmin": min(float(np.nanmin(panel)) for panel in panels.values()),
        "vmax": max(float(np.nanmax(panel)) for panel in panels.values()),
    }
    with _figure(1, len(panels), 7.5, height) as (figure, axes):
        for axis, (label, panel) in zip(axes[0], panels.items(), strict=True):
            way = "none" if panel.size < 40_000 else "auto"  # a large one is averaged over the pixels
            image = axis.imshow(panel, **{"aspect": "auto", "interpolation": way, **scale, **options})
            axis.set(title=label, xlabel=xlabel)
        figure.colorbar(image, ax=axes[0].tolist(), label=colour_label)
        axes[0, 0].set_ylabel(ylabel)
    return figure


def cubes(x: Tensor, cuts: Sequence[str], *, sequence: int = 0) -> Figure:
    """Feature tensors (t, k, d) drawn as cubes, one for each cut along `time` or `band`, with one sequence outlined.

    The front shows all bands and frames of the first feature, the top all features of the last band, and the right side
    all features of the last frame. `sequence` is the number of a band for a cut along time, and of a frame otherwise.

    Raises:
        ValueError: for any other cut.
    """
    for cut in cuts:
        if cut not in ("time", "band"):
            raise ValueError(f"cut={cut!r} must be 'time' or 'band'")
    frames, many, _ = x.shape
    width, high, (right, up) = 3.2, 1.6, (0.9, 0.55)  # size of the front, and offset of the back
    sides = (  # values, corner, and the directions of their columns and rows
        (x[:, :, 0].T, (0, 0), (width, 0), (0, high)),
        (x[:, -1, :].T, (0, high), (width, 0), (right, up)),
        (x[-1, :, :], (width, 0), (right, up), (0, high)),
    )
    edges = {  # where a cut crosses two sides, the step to the next one, and the number of sequences
        "time": (np.array([(0, 0), (width, 0), (width + right, up)]), np.array((0, high / many)), many),
        "band": (np.array([(0, 0), (0, high), (right, high + up)]), np.array((width / frames, 0)), frames),
    }
    size = float(x.abs().quantile(0.98))
    options: dict[str, Any] = {"vmin": -size, "vmax": size, "interpolation": "none", "aspect": "auto"}
    with _figure(1, len(cuts), 7.5, 2.7) as (figure, axes):
        for axis, cut in zip(axes[0], cuts, strict=True):
            for values, origin, across, upwards in sides:
                place = Affine2D.from_values(*across, *upwards, *origin) + axis.transData
                axis.imshow(np.asarray(values), **options, extent=(0, 1, 0, 1), origin="lower", transform=place)
            line, step, count = edges[cut]
            for i in range(1, count):
                axis.plot(*(line + i * step).T, color="white", linewidth=0.5)
            near, far = line + sequence * step, line + (sequence + 1) * step
            axis.plot(*np.concatenate([near, far[::-1], near[:1]]).T, color=COLOURS[5], linewidth=2.2)
            names = ("along time", "frames") if cut == "time" else ("along bands", "bands")
            axis.set_title(f"{names[0]}: {count} sequences of {frames * many // count} {names[1]}")
            axis.set(aspect="equal", xlim=(-0.25, width + right + 0.1), ylim=(-0.3, high + up + 0.1))
            axis.axis("off")
            axis.text(width / 2, -0.08, "frame →", ha="center", va="top")
            axis.text(-0.08, high / 2, "band →", ha="right", va="center", rotation=90)
            axis.text(width + right / 2 + 0.12, up / 2 - 0.08, "feature →", ha="left", va="center", rotation=31)
    return figure


def bands(tables: Mapping[str, Sequence[int]], sample_rate: int = 44_100) -> Figure:
    """Band tables on a frequency axis: each band is a block from its lowest to its highest frequency.

    Dark and light shades only separate neighbours. The label above each table gives the widths of its narrowest and its
    widest band.
    """
    with _figure(1, 1, 7.5, 0.7 + 0.65 * len(tables)) as (figure, axes):
        axis = axes[0, 0]
        for row, (label, widths) in enumerate(tables.items()):
            high = np.cumsum(widths) * sample_rate / 2 / (sum(widths) - 1)
            size, colours = np.diff(high, prepend=0), [(COLOURS[0], 0.4 if i % 2 else 1) for i in range(len(high))]
            axis.broken_barh(list(zip(high - size, size, strict=True)), (row - 0.25, 0.5), facecolors=colours)
            axis.text(0, row - 0.32, f"{label}: {size.min():,.0f} to {size.max():,.0f} Hz wide")
        axis.set_xscale("symlog", linthresh=1000, linscale=1.2)
        ticks = [0, 250, 500, 750, 1000, 2000, 4000, 8000, 16_000]
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.set(yticks=[], xlim=(0, sample_rate / 2), ylim=(len(tables) - 0.6, -0.75))
        axis.set_xlabel("frequency (Hz): logarithmic above 1 kHz")
        axis.spines["left"].set_visible(False)
    return figure


def table(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """Markdown table from rows with the same keys; floats have two decimals, NaN and None become a dash."""

    def text(value: Any) -> str:
        if value is None or value != value:
            return "–"
        return f"{value:z.2f}" if isinstance(value, float) else str(value)  # z: no −0.00

    keys = list(rows[0])
    lines = [keys, *([text(row[key]) for key in keys] for row in rows)]
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return Markdown("\n".join([head, "|" + "---|" * len(keys), *body]))
