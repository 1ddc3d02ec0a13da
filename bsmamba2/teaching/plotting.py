"""What the book draws and plays: source code, sound, spectrograms, bands, masks, curves.

Every figure function returns a matplotlib Figure that a notebook shows; nothing here computes what a
chapter teaches. Needs the extra `book` (matplotlib, IPython). Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import soundfile
import torch
from cycler import cycler
from IPython.display import HTML, Markdown, display
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D
from torch import Tensor
from tqdm import tqdm

from ..spectrogram import stft

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, told apart by all
STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "font.size": 10,
    "image.cmap": "magma",
}


class Picture(Figure):
    """A figure that a notebook shows by itself, whatever matplotlib backend is set."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=self.dpi)
        return file.getvalue()


@contextmanager
def _figure(rows: int, columns: int, width: float, height: float, **kwargs: Any) -> Iterator[tuple[Figure, np.ndarray]]:
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(width, height))
        yield figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def source(*objects: Callable[..., Any]) -> Markdown:
    """The module's own text of some functions or classes, with the file they stand in."""
    parts = []
    for thing in objects:
        module = inspect.getmodule(thing)
        file = module.__name__.replace(".", "/") + ".py" if module else "?"
        parts.append(f"`{file}`\n\n```python\n{textwrap.dedent(inspect.getsource(thing)).rstrip()}\n```")
    return Markdown("\n\n".join(parts))


def audio(signals: Mapping[str, Tensor], sample_rate: int = 44_100) -> HTML:
    """Players, one above the other, all scaled by one factor so that their levels compare.

    The sound is embedded as MP3: a few hundred kilobytes for six seconds, and every browser plays it.

    Args:
        signals: label → (c, samples).
        sample_rate: in hertz.

    Raises:
        ValueError: for samples that are not finite.
    """
    peak = max(float(signal.abs().max()) for signal in signals.values())
    if not np.isfinite(peak):
        raise ValueError("a signal to play holds NaN or infinite samples")
    players = []
    for label, signal in signals.items():
        file = io.BytesIO()
        frames = (signal.detach().cpu() * (0.9 / max(peak, 1e-9))).T.numpy()
        soundfile.write(file, frames, sample_rate, format="MP3")
        data = base64.b64encode(file.getvalue()).decode()
        name = html.escape(label)
        players.append(
            f'<figure class="player"><figcaption>{name}</figcaption>'
            f'<audio controls preload="metadata" aria-label="{name}" src="data:audio/mpeg;base64,{data}"></audio>'
            "</figure>"
        )
    return HTML("\n".join(players))


def explorable(
    kind: str, name: str, sliders: Mapping[str, Sequence[str]], settings: Sequence[Mapping[str, Any]], **common: Any
) -> HTML:
    """Something that follows its sliders on a page, without a kernel: every setting is in the page.

    Drawn by `book/_static/explore.js`, which the book's pages load; JupyterLab shows the first sentence alone.

    Args:
        kind: "curves", "bands" or "listen", one of the script's kinds.
        name: unlike that of any other on the page, a word.
        sliders: label → the words for its positions, from left to right; it starts in the middle.
        settings: one for each combination of positions, the last slider's fastest. Each has `told`, a sentence, and
            what its kind draws.
        common: what all settings share.

    Raises:
        ValueError: when there are not as many settings as combinations.
    """
    count = math.prod(len(values) for values in sliders.values())
    if len(settings) != count:
        raise ValueError(f"the sliders have {count} combinations of positions, and there are {len(settings)} settings")
    controls, start = [], 0
    for i, (label, values) in enumerate(sliders.items()):
        middle = len(values) // 2
        start = start * len(values) + middle
        words = html.escape(json.dumps(list(values), ensure_ascii=False), quote=True)
        controls.append(
            f'<div class="control"><label for="{name}-{i}">{html.escape(label)}</label>'
            f'<input type="range" id="{name}-{i}" min="0" max="{len(values) - 1}" step="1" value="{middle}"'
            f' data-values="{words}" aria-valuetext="{html.escape(values[middle])}" autocomplete="off">'
            f'<output for="{name}-{i}">{html.escape(values[middle])}</output></div>'
        )
    # "</script" inside of it would end the element.
    data = json.dumps({"common": common, "settings": settings}, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("</", "<\\/")
    return HTML(
        f'<div class="explorable" id="{name}" data-kind="{kind}">{"".join(controls)}'
        f'<p class="told" aria-live="polite">{html.escape(settings[start]["told"])}</p>'
        f'<div class="drawing"><noscript>The drawing needs JavaScript.</noscript></div>'
        f'<script type="application/json">{data}</script></div>'
    )


def thumbnail(signal: Tensor, sample_rate: int = 44_100, *, top: float = 8_000.0, loudest: float | None = None) -> str:
    """A small spectrogram without axes, 0 to `top` hertz, as the address of a picture that holds itself (`data:`).

    Args:
        signal: (c, samples).
        sample_rate: in hertz.
        top: highest frequency shown, in hertz.
        loudest: the power that is drawn brightest; that of the loudest bin when absent.
    """
    n_fft, hop_length = 2048, 1764
    power = stft(signal, n_fft, hop_length).abs().square().mean(0)[: int(top / sample_rate * n_fft)]
    level = 10 * torch.log10(power / max(loudest or float(power.max()), 1e-9) + 1e-9)
    small = torch.nn.functional.adaptive_max_pool2d(level[None], (72, level.shape[1]))[0]
    file = io.BytesIO()
    matplotlib.image.imsave(file, small.flip(0).numpy(), vmin=-80, vmax=0, cmap="magma", format="png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def sound(signal: Tensor, sample_rate: int = 44_100, *, gain: float = 1.0, compression: float = 0.6) -> str:
    """A signal as MP3, as the address of a sound that holds itself (`data:`).

    Args:
        signal: (c, samples).
        sample_rate: in hertz.
        gain: factor.
        compression: 0 to 1, the largest and the smallest.
    """
    file = io.BytesIO()
    frames = (signal.detach().cpu() * gain).T.numpy()
    soundfile.write(file, frames, sample_rate, format="MP3", compression_level=compression)
    return f"data:audio/mpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def progress(iterable: Iterable[Any], total: int, label: str, unit: str = "step") -> Iterator[Any]:
    """What is iterated over, with a progress bar that leaves one line behind in a stored notebook."""
    yield from tqdm(iterable, total=total, desc=label, unit=unit, file=_Line(), mininterval=1, ascii=False, ncols=88)


class _Line(io.TextIOBase):
    """A text file of one line that is shown again and again in the same place of a notebook."""

    def __init__(self) -> None:
        self.handle = display(HTML("<pre></pre>"), display_id=True)

    def write(self, text: str) -> int:
        line = text.replace("\r", "").replace("\n", "")
        if line.strip() and self.handle is not None:
            self.handle.update(HTML(f"<pre>{html.escape(line)}</pre>"))
        return len(text)


def decibels(spectrogram: Tensor, floor: float = -80.0) -> Tensor:
    """20 · log10 of the modulus relative to its largest value, not below `floor`; any shape, real or complex."""
    modulus = spectrogram.abs()
    return (20 * torch.log10(modulus / modulus.max().clamp(min=1e-12) + 1e-12)).clamp(min=floor)


def spectrograms(
    signals: Mapping[str, Tensor],
    sample_rate: int = 44_100,
    *,
    top: float = 10_000.0,
    n_fft: int = 2048,
    hop_length: int = 441,
) -> Figure:
    """One spectrogram under the other, on one scale: 0 dB is the loudest bin of all.

    Args:
        signals: label → (c, samples); the mean of the channels' power is drawn.
        sample_rate: in hertz.
        top: highest frequency shown, in hertz.
        n_fft: of the STFT, in samples.
        hop_length: of the STFT, in samples.
    """
    power = {label: stft(signal, n_fft, hop_length).abs().square().mean(0) for label, signal in signals.items()}
    loudest = max(float(values.max()) for values in power.values())
    bins = int(top / sample_rate * n_fft)
    with _figure(len(signals), 1, 7.5, 1.9 * len(signals), sharex=True) as (figure, axes):
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
    """Curves over one pair of axes. `limits` go to matplotlib's Axes.set (xscale, ylim, …)."""
    styles = ("-", "--", "-.", ":")
    with _figure(1, 1, 7.5, height) as (figure, axes):
        for i, (label, (x, y)) in enumerate(series.items()):
            axes[0, 0].plot(x, y, styles[i % len(styles)], label=label)
        axes[0, 0].set(xlabel=xlabel, ylabel=ylabel, **limits)
        if len(series) > 1:
            axes[0, 0].legend(frameon=False)
    return figure


def scores(
    rows: Sequence[Any], across: str, xlabel: str, measures: Mapping[str, str], *, ticks: Sequence[float] = ()
) -> Figure:
    """A point for each row, one measure under the other.

    Args:
        rows: with the attributes named below, `evaluate.Row` for instance; NaN and infinite values are not drawn.
        across: the attribute along x.
        xlabel: what it is, with its unit.
        measures: attribute → its label, with its unit.
        ticks: when x has a few values only, these: evenly spaced by their logarithm, with a line through the means.
    """
    with _figure(len(measures), 1, 7.5, 2.3 * len(measures), sharex=True) as (figure, axes):
        for axis, (measure, label), colour in zip(axes[:, 0], measures.items(), itertools.cycle(COLOURS), strict=False):
            points = [(getattr(row, across), getattr(row, measure)) for row in rows]
            points = [(x, y) for x, y in points if np.isfinite(y)]
            axis.plot([x for x, _ in points], [y for _, y in points], "o", color=colour, alpha=0.5, label="a track")
            if ticks:
                shared = sorted({x for x, _ in points})
                means = [float(np.mean([y for x, y in points if x == place])) for place in shared]
                axis.plot(shared, means, "-", color=colour, label="mean")
                axis.set_xscale("log")
                axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axis.minorticks_off()
                axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
            axis.set_ylabel(label)
        axes[-1, 0].set_xlabel(xlabel)
    return figure


def images(
    arrays: Mapping[str, Any], xlabel: str, ylabel: str, *, colour_label: str = "", height: float = 3.2, **options: Any
) -> Figure:
    """Matrices side by side, row 0 on top unless `origin="lower"`; `options` go to matplotlib's imshow.

    Given `vmin` and `vmax`, all share one scale and one colour bar.
    """
    shared = {"vmin", "vmax"} <= options.keys()
    with _figure(1, len(arrays), 7.5, height) as (figure, axes):
        for axis, (label, array) in zip(axes[0], arrays.items(), strict=True):
            image = axis.imshow(np.asarray(array), **{"aspect": "auto", "interpolation": "nearest", **options})
            axis.set(title=label, xlabel=xlabel)
            if not shared:
                figure.colorbar(image, ax=axis, label=colour_label)
        if shared:
            figure.colorbar(image, ax=axes[0].tolist(), label=colour_label)
        axes[0, 0].set_ylabel(ylabel)
    return figure


def cubes(x: Tensor, cuts: Sequence[str], *, strip: int = 0) -> Figure:
    """Features as a block of three axes, cut into the strips that a layer reads; one of them is outlined.

    Seen are the sides that face the reader: all bands and frames of the first feature in front, all features of the
    last band on top, and of the last frame on the right.

    Args:
        x: (t, k, d).
        cuts: for each block along what it is cut, `time` or `band`.
        strip: the outlined one: a band where it is cut along time, else a frame.

    Raises:
        ValueError: for another cut.
    """
    for cut in cuts:
        if cut not in ("time", "band"):
            raise ValueError(f"cut={cut!r} must be 'time' or 'band'")
    frames, many, _ = x.shape
    width, high, (right, up) = 3.2, 1.6, (0.9, 0.55)  # of the front, and how far its back lies to the right and up
    sides = (  # numbers, where they begin, and where their rows and columns lead
        (x[:, :, 0].T, (0, 0), (width, 0), (0, high)),
        (x[:, -1, :].T, (0, high), (width, 0), (right, up)),
        (x[-1, :, :], (width, 0), (right, up), (0, high)),
    )
    size = float(x.abs().quantile(0.98))
    options: dict[str, Any] = {"vmin": -size, "vmax": size, "interpolation": "nearest", "aspect": "auto"}

    def edges(cut: str, share: float) -> np.ndarray:
        """Where a cut runs over two sides: three corners of it, (3, 2)."""
        if cut == "time":
            return np.array([(0, share * high), (width, share * high), (width + right, share * high + up)])
        return np.array([(share * width, 0), (share * width, high), (share * width + right, high + up)])

    with _figure(1, len(cuts), 7.5, 2.7) as (figure, axes):
        for axis, cut in zip(axes[0], cuts, strict=True):
            for values, origin, across, upwards in sides:
                place = Affine2D.from_values(*across, *upwards, *origin) + axis.transData
                axis.imshow(np.asarray(values), **options, extent=(0, 1, 0, 1), origin="lower", transform=place)
            if cut == "time":
                count, title = many, f"along time: {many} strips of {frames} frames"
            else:
                count, title = frames, f"along bands: {frames} strips of {many} bands"
            for i in range(1, count):
                axis.plot(*edges(cut, i / count).T, color="white", linewidth=0.5)
            near, far = edges(cut, strip / count), edges(cut, (strip + 1) / count)
            axis.plot(*np.concatenate([near, far[::-1], near[:1]]).T, color=COLOURS[4], linewidth=1.8)
            axis.set(title=title, aspect="equal")
            axis.set(xlim=(-0.25, width + right + 0.1), ylim=(-0.3, high + up + 0.1))
            axis.axis("off")
            axis.text(width / 2, -0.08, "frame →", ha="center", va="top")
            axis.text(-0.08, high / 2, "band →", ha="right", va="center", rotation=90)
            axis.text(width + right / 2 + 0.12, up / 2 - 0.08, "feature →", ha="left", va="center", rotation=31)
    return figure


def bands(tables: Mapping[str, Sequence[int]], sample_rate: int = 44_100) -> Figure:
    """Band tables on a hertz axis: each band a block from its lowest to its highest frequency."""
    with _figure(1, 1, 7.5, 0.9 + 0.55 * len(tables)) as (figure, axes):
        axis = axes[0, 0]
        for row, widths in enumerate(tables.values()):
            hertz = sample_rate / 2 / (sum(widths) - 1)
            edges = np.concatenate([[0], np.cumsum(widths)]) * hertz
            for i, (low, high) in enumerate(itertools.pairwise(edges)):
                axis.barh(row, high - low, left=low, height=0.7, color=COLOURS[i % 2], edgecolor="white", linewidth=0.3)
        axis.set_xscale("symlog", linthresh=1000, linscale=1.2)
        ticks = [0, 250, 500, 750, 1000, 2000, 4000, 8000, 16_000]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set(yticks=range(len(tables)), yticklabels=list(tables))
        axis.set_xlabel("frequency (Hz): linear to 1 kHz, logarithmic above")
        axis.invert_yaxis()
    return figure


def table(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """A Markdown table of rows with the same keys; floats with two decimals, a dash for NaN and None."""

    def text(value: Any) -> str:
        if value is None or value != value:
            return "–"
        return f"{value:z.2f}" if isinstance(value, float) else str(value)  # z: no −0.00

    keys = list(rows[0])
    head = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return Markdown("\n".join([*head, *("| " + " | ".join(text(row[key]) for key in keys) + " |" for row in rows)]))
