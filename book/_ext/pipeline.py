"""A Sphinx extension: "you are here", the model's pipeline under the title of every chapter.

Each box names a stage with the shape of its output and links to the chapter that builds it; the boxes of the
current chapter are lit. JupyterLab shows the chapter without it.
"""

from __future__ import annotations

from html import escape
from pathlib import PurePosixPath
from typing import Any

# Stage, shape of its output, chapter.
STAGES = (
    ("mixture", "(b, c, samples)", "01_sound"),
    ("spectrogram", "(b, c, f, t)", "02_spectrogram"),
    ("bands", "(b, t, k, d)", "03_bands"),
    ("L × along time", "(b·k, t, d)", "06_mamba2"),
    ("L × along bands", "(b·t, k, d)", "07_dual_path"),
    ("masks", "(b, stem, c, f, t)", "04_masks"),
    ("stems", "(b, stem, c, samples)", "08_model"),
)
LAYERS = ("L × along time", "L × along bands")
ALL = tuple(stage for stage, *_ in STAGES)
HERE = {
    "01_sound": ("mixture",),
    "02_spectrogram": ("spectrogram",),
    "03_bands": ("bands",),
    "04_masks": ("masks",),
    "05_scan": LAYERS,
    "06_mamba2": ("L × along time",),
    "07_dual_path": LAYERS,
    "08_model": ALL,
    "09_chunks": LAYERS,
    "10_kernel": LAYERS,
    "11_precision": LAYERS,
    "12_training": ALL,
    "13_separating": ("mixture", "stems"),
    "14_measuring": ("stems",),
    "15_scaling": ALL,
    "16_port": ALL,
    "18_silence": LAYERS,
}
"""Chapter → stages that are lit."""


def pipeline(chapter: str) -> str:
    """The pipeline as HTML, with the stages of a chapter lit."""
    boxes = []
    for stage, shape, built in STAGES:
        lit = ' class="here"' if stage in HERE[chapter] else ""
        words = f"{escape(stage)}<small>{escape(shape)}</small>"
        if built != chapter:
            words = f'<a href="{built}.html">{words}</a>'
        boxes.append(f"<li{lit}>{words}</li>")
    return f'<nav class="pipeline" aria-label="You are here in the model"><ol>{"".join(boxes)}</ol></nav>'


def add_pipeline(
    app: Any,
    pagename: str,
    templatename: str,
    context: dict[str, Any],
    doctree: Any,
) -> None:
    """Put the pipeline under the title of a chapter."""
    chapter = PurePosixPath(pagename).name
    if chapter in HERE:
        context["body"] = context["body"].replace(
            "</h1>", "</h1>" + pipeline(chapter), 1
        )


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", add_pipeline)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
