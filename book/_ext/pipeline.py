"""A Sphinx extension: "you are here", the model's pipeline under the title of every chapter, and what goes with it.

Each box names a stage with the shape of its output and links to the chapter that builds it; the boxes of the
current chapter are lit. A line at the end of a page links to its explorables, labs and words; each word of the
glossary links back. JupyterLab shows the chapter without them.
"""

from __future__ import annotations

import re
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

EXPLORABLES = {
    "bands": "03_bands",
    "scan": "05_scan",
    "decay": "05_scan",
    "halflife": "06_mamba2",
    "reach": "07_dual_path",
    "chunk": "09_chunks",
    "roofline": "10_kernel",
    "bits": "11_precision",
    "blind": "12_training",
    "leak": "14_measuring",
    "occupancy": "14_measuring",
    "faults": "16_port",
}
"""Name of an explorable on the Explore page → chapter."""

LABS = {
    "bands": "03_bands",
    "decay": "05_scan",
    "chunk": "09_chunks",
    "ablation": "12_training",
    "occupancy": "14_measuring",
}
"""Notebook in book/labs → chapter."""

WORDS = {
    "01_sound": "accompaniment; decibel; dither; estimate; ground truth; level; masking; mixture; occupancy; sample; SDR; stem",
    "02_spectrogram": "bin; frame; hop; modulus; overlap-add; phase; spectral leakage; spectrogram; window",
    "03_bands": "band; band split; unit norm",
    "04_masks": "complex ideal ratio mask (cIRM); GLU; mask; oracle mask; soft mask",
    "05_scan": "B and C; cumulative sum (prefix sum); decay; decay matrix; outer product; scan; selectivity; state; "
    "state-space model (SSM)",
    "06_mamba2": "causal; depthwise convolution; gate; half-life (time constant); head; log-uniform; mixer; RMS norm; "
    "SiLU; softplus; step",
    "07_dual_path": "bidirectional block; dual-path layer; receptive field; time-band grid",
    "08_model": "checkpoint; forward hook; pickle; preset; safetensors; test-time augmentation",
    "09_chunks": "chunk; cost model; FLOP; memory bandwidth",
    "10_kernel": "arithmetic intensity; compute-bound; eager mode; fused kernel; global memory (HBM); kernel; memory-bound; "
    "ridge point; roofline; SRAM (on-chip memory, shared memory)",
    "choosing_a_backend": "backend; self-test",
    "cpu_kernel": "workspace (scratch buffer)",
    "11_precision": "autocast; bfloat16; catastrophic cancellation; compensated summation; segment sum; significand",
    "12_training": "AdamW; EMA; gradient clipping; multi-resolution STFT loss; overfit; schedule; target; "
    "training set, validation set; warm-up; weight decay",
    "beyond_the_recipe": "data augmentation; Muon; Newton–Schulz iteration; orthogonalise; SNR loss",
    "13_separating": "aliasing; anti-aliasing filter; crossfade; look-ahead; Nyquist frequency; segment; streaming",
    "14_measuring": "bleedless; cSDR; evaluation protocol; fullness; onset; SI-SDR; silence leakage; uSDR",
    "15_scaling": "accumulation; activation (gradient) checkpointing; activations; all-reduce; data loader; "
    "data parallelism; epoch",
    "16_port": "mutation testing; port; property-based test; reference implementation; reference value (analytic, golden); "
    "smoke test",
    "18_silence": "attention; LSTM; rotary position embedding (RoPE); seed",
    "inside_the_model": "intervention; logit lens; paired difference; standard error",
    "bundled_checkpoint": "domain shift; held-out; sound font",
}
"""Page → the terms of the glossary that it explains."""


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


def companions(page: str, anchors: dict[str, str]) -> str:
    """The lines with a page's explorables, labs and words as HTML.

    `anchors`: term → its place in the glossary.
    """
    play = [
        f'<a href="explore.html#explore-{name}">Explore: {name}</a>'
        for name, chapter in EXPLORABLES.items()
        if chapter == page
    ] + [
        f'<a href="explore.html#labs">lab <code>{name}.ipynb</code></a>'
        for name, chapter in LABS.items()
        if chapter == page
    ]
    words = [
        f'<a href="glossary.html#{anchors[word]}">{escape(word)}</a>'
        for word in WORDS[page].split("; ")
        if word in anchors
    ]
    lines = "".join(
        f"<p><strong>{kind}:</strong> {', '.join(links)}</p>"
        for kind, links in (("Play", play), ("Words", words))
        if links
    )
    return f'<nav class="companions" aria-label="Explorables, labs and words of this page">{lines}</nav>'


def with_pages(glossary: str) -> str:
    """The source of the glossary, every entry with a link to its page."""
    pages = {
        word: page for page in WORDS for word in WORDS[page].split("; ")
    }

    def linked(entry: re.Match[str]) -> str:
        page = pages.get(entry[1])
        return f"{entry[0]} See {{doc}}`{page}`." if page else entry[0]

    return re.sub(r"(?m)^(\S.*)\n  .+", linked, glossary)


def add_links(
    app: Any,
    pagename: str,
    templatename: str,
    context: dict[str, Any],
    doctree: Any,
) -> None:
    """Put the pipeline under a chapter's title, and a page's companions at its end."""
    page = PurePosixPath(pagename).name
    if page in HERE:
        context["body"] = context["body"].replace(
            "</h1>", "</h1>" + pipeline(page), 1
        )
    if page in WORDS:
        anchors = {
            name: anchor
            for (kind, name), (_, anchor) in app.env.domains[
                "std"
            ].objects.items()
            if kind == "term"
        }
        context["body"] += companions(page, anchors)


def add_pages(app: Any, docname: str, source: list[str]) -> None:
    """Link every entry of the glossary to its page."""
    if PurePosixPath(docname).name == "glossary":
        source[0] = with_pages(source[0])


def setup(app: Any) -> dict[str, bool]:
    app.connect("html-page-context", add_links)
    app.connect("source-read", add_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
