"""Plotting: figures show the numbers that they are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bsmamba2.teaching import plotting


def test_cubes_show_three_sides_and_outline_a_sequence() -> None:
    x = torch.arange(2.0 * 3 * 4).reshape(2, 3, 4)  # (t, k, d)
    figure = plotting.cubes(x, ["time", "band"], sequence=1)
    assert [axis.get_title() for axis in figure.axes] == [
        "along time: 3 sequences of 2 frames",
        "along bands: 2 sequences of 3 bands",
    ]
    for axis, cuts in zip(figure.axes, (2, 1), strict=True):
        front, top, side = (image.get_array() for image in axis.images)
        # Bands upwards and frames to the right; features to the back; features to the back and bands upwards.
        np.testing.assert_array_equal(front, x[:, :, 0].T)
        np.testing.assert_array_equal(top, x[:, 2, :].T)
        np.testing.assert_array_equal(side, x[1])
        assert len(axis.lines) == cuts + 1
    ends = figure.axes[0].lines[-1].get_ydata()
    assert min(ends) == pytest.approx(1.6 / 3)  # the second of three bands begins at a third of the height


def test_another_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="cut='depth'"):
        plotting.cubes(torch.zeros(2, 2, 2), ["depth"])


def test_lines_of_pairs_that_are_read_once() -> None:
    figure = plotting.lines({"a": zip((1, 5), (3, 9), strict=True)}, "x", "y")
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 5], [3, 9]]
