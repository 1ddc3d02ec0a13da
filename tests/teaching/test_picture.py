"""Figures as SVG: two drawings, in which nothing is lost and nothing is too small."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ET

import numpy as np
import PIL.Image
import pytest
import torch

from bsmamba2.teaching import plotting
from bsmamba2.teaching.picture import COLOURS, Picture

SVG = "{http://www.w3.org/2000/svg}"


def drawings(figure: Picture) -> tuple[ET.Element, ET.Element]:
    """The wide and the narrow drawing of a figure."""
    root = ET.fromstring(figure._repr_svg_())
    assert root.get("class") == "diagram"
    wide, narrow = root.findall(f"{SVG}svg")
    assert (wide.get("class"), narrow.get("class"), narrow.get("display")) == ("wide", "narrow", "none")
    return wide, narrow


def words(drawing: ET.Element) -> list[str]:
    return ["".join(text.itertext()) for text in drawing.iter(f"{SVG}text")]


def size(drawing: ET.Element) -> tuple[float, float]:
    _, _, width, height = map(float, drawing.get("viewBox", "").split())
    return width, height


def picture(drawing: ET.Element) -> PIL.Image.Image:
    address = next(drawing.iter(f"{SVG}image")).get("href", "")
    return PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))


def test_black_follows_the_page_and_colours_stay() -> None:
    figure = plotting.lines({"a": (range(3), range(3)), "b": (range(3), range(3))}, "x", "y")
    before = figure.axes[0].get_legend()
    text = figure._repr_svg_()  # type: ignore[attr-defined]
    assert "#000000" not in text
    assert "font-family:" not in text
    assert text.lower().count(COLOURS[0].lower()) == 4  # a line and its legend, twice
    assert text == figure._repr_svg_()  # type: ignore[attr-defined]
    assert figure.axes[0].get_legend() is before  # the figure itself is as it was


def test_panels_of_a_row_are_stacked_for_a_phone() -> None:
    figure = plotting.images({"one": torch.rand(4, 5), "two": torch.rand(4, 5)}, "frame", "band")
    wide, narrow = drawings(figure)  # type: ignore[arg-type]
    assert size(wide) == (540, 230.4)
    assert size(narrow)[0] == 288 < size(narrow)[1]
    assert words(wide).count("band") == 1
    assert words(narrow).count("band") == 2
    for drawing in (wide, narrow):  # four by five cells, whatever the size
        assert picture(drawing).size == (5, 4)


def test_legends_stand_above_the_axes_in_as_many_columns_as_fit() -> None:
    names = [f"the series number {i}" for i in range(5)]
    figure = plotting.lines({name: (range(3), range(3)) for name in names}, "x", "y")
    figure.axes[0].legend(loc="lower right", fontsize=6)
    wide, narrow = drawings(figure)  # type: ignore[arg-type]
    for drawing, rows in ((wide, 2), (narrow, 3)):
        entries = [text for text in drawing.iter(f"{SVG}text") if "".join(text.itertext()) in names]
        assert len(entries) == 5
        heights = {round(float(text.get("y", "nan"))) for text in entries}
        assert len(heights) >= rows
        axes_top = min(float(text.get("y", "nan")) for text in drawing.iter(f"{SVG}text") if text.text == "2.0")
        assert max(heights) < axes_top
        assert all("10px" in text.get("style", "") for text in entries)
    assert size(narrow)[1] > size(wide)[1] > 216  # the axes keep their height


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.02, 0.7), ["0.02", "0.05", "0.1", "0.2", "0.5"]),
        ((1, 1_000), ["1", "10", "100", "1,000"]),
        ((1e-9, 1), ["10⁻⁸", "10⁻⁶", "10⁻⁴", "0.01", "1"]),
    ],
)
def test_logarithmic_axes_have_plain_numbers(values: tuple[float, float], expected: list[str]) -> None:
    figure = plotting.lines({"a": (values, (0.1, 0.2))}, "x", "y", xscale="log")
    found = words(drawings(figure)[0])  # type: ignore[arg-type]
    assert [word for word in found if word in expected] == expected
    assert not any("×" in word or "$" in word for word in found)


def test_tick_labels_do_not_touch_and_limits_stay() -> None:
    sizes = [10.0**i for i in range(6)]
    figure = plotting.lines({"a": (sizes, sizes)}, "x", "y", xscale="log", xlim=(0.6, 2e5))
    wide, narrow = map(words, drawings(figure))  # type: ignore[arg-type]
    assert {"1,000", "10,000", "100,000"} <= set(wide)
    assert {"1,000", "10,000"} <= set(narrow)
    assert "100,000" not in narrow  # it would touch the one before
    assert "0.1" not in narrow  # outside the limits


def test_large_pictures_have_few_colours_and_true_ones() -> None:
    rows = torch.linspace(0, 1, 300)[:, None] * torch.ones(300)
    rows[:, :30] = torch.rand(300, 30)  # so that the picture is large as a file too
    figure = plotting.images({"rows": rows}, "x", "y", vmin=0, vmax=1, cmap="gray", interpolation="none")
    found = picture(drawings(figure)[0])  # type: ignore[arg-type]
    assert found.mode == "P"
    error = np.asarray(found.convert("RGBA"), float)[..., 0] - 255 * rows.numpy()
    assert np.abs(error).max() < 32
    assert np.abs(error).mean() < 8
