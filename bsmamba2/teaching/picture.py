"""Figures as SVG that follow the theme and the width of a page of the book; `plotting` draws them.

Needs the extra `book` (matplotlib).
"""

from __future__ import annotations

import base64
import io
import pickle
import re
import textwrap
from typing import Any

import matplotlib
import PIL.Image
from cycler import cycler
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: safe for the colour-blind
STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.titlesize": 11,
    "font.size": 10,
    "image.cmap": "magma",
    "image.interpolation_stage": "data",
    "svg.fonttype": "none",
    "svg.hashsalt": "bsmamba2",
}
PHONE = 4.0  # inches: text of 10 points is 12 pixels high in a column of 350 pixels


class Picture(Figure):
    """A matplotlib Figure that a notebook displays as SVG, under any matplotlib backend.

    The SVG contains two drawings: the original figure, which JupyterLab shows on a white background, and a narrow one
    for phones, with stacked panels. `book/_ext/diagrams.py` puts both into a page, where black becomes the text colour.
    """

    def _repr_svg_(self) -> str:
        with matplotlib.rc_context(STYLE):
            drawings = _drawing(self, "wide") + _drawing(self, "narrow")
        width, height = 72 * self.get_size_inches()
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="diagram" width="{width:g}" height="{height:g}">'
            f'<rect width="100%" height="100%" fill="white"/>{drawings}</svg>'
        )


def _drawing(original: Figure, layout: str) -> str:
    """One of the two drawings, made from a copy of the figure."""
    figure = pickle.loads(pickle.dumps(original))
    if layout == "narrow":
        _stack(figure)
    width, height = 72 * figure.get_size_inches()
    for axes in figure.axes:
        if place := axes.get_subplotspec():  # not a colour bar
            rows, columns = place.get_gridspec().get_geometry()
            axes.set_title(_wrap(axes.get_title(), width / columns - 20))
            axes.set_xlabel(_wrap(axes.get_xlabel(), 0.8 * width / columns))
            axes.set_ylabel(_wrap(axes.get_ylabel(), 0.6 * height / rows))
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log" and not isinstance(axis.get_major_locator(), FixedLocator):
                low, high = axis.get_view_interval()
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
                axis.set_major_formatter(_number)
                axis.set_minor_formatter(NullFormatter())
    _move_legends(figure)
    height = 72 * figure.get_figheight()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # so that thinning the labels does not move the axes
    for axes in figure.axes:
        _thin(axes.xaxis)
        _thin(axes.yaxis)
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", dpi=150, transparent=True, metadata=nothing)
    body = re.sub(r".*?</defs>", "", file.getvalue(), count=1, flags=re.DOTALL)  # drop the head and the page-wide style
    body = re.sub(r' id="[\w.]+_\d+"| transform="rotate\(-0 [^"]*"|font-family: [^;"]*;? ?|xlink:(?=href)', "", body)
    body = re.sub(r">\s+<", "><", body)
    body = re.sub(r'(?<= d=")[^"]+', lambda path: re.sub(r"(\.\d\d)\d+|\s+", r"\1 ", path[0]), body)
    body = re.sub(r"(?<=data:image/png;base64,)[^\"]+", _fewer_colours, body).replace("#000000", "currentColor")
    hidden = ' display="none"' if layout == "narrow" else ""
    return (
        f'<svg class="{layout}"{hidden} viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" fill="currentColor"'
        f' stroke-linejoin="round">{body}'
    )


def _stack(figure: Figure) -> None:
    """Make a figure as narrow as a phone, with its panels in one column."""
    panels = [(axes, place) for axes in figure.axes if (place := axes.get_subplotspec())]
    columns = panels[0][1].get_gridspec().ncols
    if columns > 1:
        grid = GridSpec(len(panels), 1, figure=figure)
        for i, (axes, _) in enumerate(panels):
            axes.set_subplotspec(grid[i])
            axes.tick_params(labelleft=True, labelbottom=True)
            axes.set_ylabel(axes.get_ylabel() or panels[0][0].get_ylabel())
    figure.set_size_inches(PHONE, figure.get_figheight() * (0.7 * columns if columns > 1 else 1))


def _wrap(text: str, points: float) -> str:
    lines = text.splitlines()
    return "\n".join(textwrap.fill(line, max(10, int(points / 5.6)), break_long_words=False) for line in lines)


def _move_legends(figure: Figure) -> None:
    """Merge all legends into one above the axes, where it hides nothing, with as many columns as fit."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        if old := axes.get_legend():
            entries |= {text.get_text(): mark for mark, text in zip(old.legend_handles, old.get_texts(), strict=True)}
            old.remove()
    for columns in range(len(entries), 0, -1):
        options: dict[str, Any] = {"ncols": columns, "frameon": False, "borderaxespad": 0}
        new = figure.legend(list(entries.values()), list(entries), loc="outside upper left", **options)
        box = new.get_window_extent()
        if columns == 1 or box.width < figure.bbox.width:  # the axes keep their height
            figure.set_figheight(figure.get_figheight() + (box.height - 25) / figure.dpi)
            break
        new.remove()


def _thin(axis: Axis) -> None:
    """Leave out tick labels that would touch the previous one."""
    labels, last, kept = axis.get_ticklabels(), None, []
    for label in labels:
        box = label.get_window_extent().padded(4)
        fits = bool(label.get_text()) and (last is None or not box.overlaps(last))
        kept.append(label.get_text() if fits else "")
        last = box if fits else last
    if [label.get_text() for label in labels] != kept:
        low, high = axis.get_view_interval()
        axis.set_ticks(axis.get_ticklocs(), kept)
        axis.set_view_interval(low, high, ignore=True)  # ticks outside would widen it


def _number(value: float, _: Any = None) -> str:
    """A number on a logarithmic axis: 0.02, 5, 1,000, 10⁻⁸."""
    if 1e-4 < value < 1e6:
        return f"{value:,.10g}"
    mantissa, power = f"{value:.0e}".split("e")
    superscript = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ("" if mantissa == "1" else f"{mantissa}·") + "10" + superscript


def _fewer_colours(png: re.Match[str]) -> str:
    """A PNG in base64; a large one is reduced to 256 colours, because a colour map has no more."""
    data = base64.b64decode(png[0])
    if len(data) > 10_000:
        image, file = PIL.Image.open(io.BytesIO(data)), io.BytesIO()
        few = image.quantize(256, PIL.Image.Quantize.FASTOCTREE, dither=PIL.Image.Dither.NONE)
        few.save(file, "PNG", optimize=True)
        data = file.getvalue()
    return base64.b64encode(data).decode()
