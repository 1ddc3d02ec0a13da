"""Explorables: interactive figures for static pages, each with a question to answer first and a folded answer.

Each figure function returns one explorable, for a chapter and for the page "Explore". The library computes the data
for all positions of the sliders and embeds them in the page; `book/_static/explore.js` only draws them. JupyterLab does
not load that script, so it shows only the question, a description of one position, and the answer.

Axis letters: see `bsmamba2.config`.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from IPython.display import HTML
from torch import Tensor

from .. import ssd
from ..dual_path import DualPath
from ..experiments.cost import GPUS
from ..mamba2 import Mamba2
from . import demos


def explorable(
    kind: str,
    name: str,
    question: str,
    answer: str,
    sliders: Mapping[str, Sequence[str]],
    settings: Sequence[Mapping[str, Any]],
    *,
    start: Sequence[int] | None = None,
    **common: Any,
) -> HTML:
    """Interactive figure with sliders that works on a static page: all settings are precomputed and embedded.

    Args:
        kind: how the script draws it: "curves", "bands", "grids", "meters" or "listen".
        name: one word, unique on the page; the element's id is `explore-` followed by this word.
        question, answer: plain text; the answer is folded.
        sliders: label → texts for its positions, from left to right.
        settings: one for each combination of positions, the last slider varying fastest. Each contains a `caption` and
            the data to draw.
        start: initial position of each slider; by default the middle.
        common: data shared by all settings.

    Raises:
        ValueError: if the number of settings differs from the number of combinations.
    """
    count = math.prod(len(values) for values in sliders.values())
    if len(settings) != count:
        raise ValueError(f"the sliders have {count} combinations of positions, and there are {len(settings)} settings")
    controls, first = [], 0
    places = start or [len(values) // 2 for values in sliders.values()]
    for i, ((label, values), place) in enumerate(zip(sliders.items(), places, strict=True)):
        first = first * len(values) + place
        words = html.escape(json.dumps(list(values), ensure_ascii=False), quote=True)
        controls.append(
            f'<div class="control"><label for="explore-{name}-{i}">{html.escape(label)}</label>'
            f'<input type="range" id="explore-{name}-{i}" min="0" max="{len(values) - 1}" step="1" value="{place}"'
            f' data-values="{words}" aria-valuetext="{html.escape(values[place])}" autocomplete="off">'
            f'<output for="explore-{name}-{i}">{html.escape(values[place])}</output></div>'
        )
    data = json.dumps({"common": common, "settings": settings}, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("</", "<\\/")  # "</script" would end the element
    body = (
        f'<div class="controls" hidden>{"".join(controls)}</div>'
        f'<p class="caption" aria-live="polite">{html.escape(settings[first]["caption"])}</p>'
        f'<div class="drawing"><p>The page of the built book draws this, with sliders; '
        "the sentences above describe one position.</p></div>"
    )
    script = f'<script type="application/json">{data}</script>'
    return framed(kind, name, question, body, f"<p>{html.escape(answer)}</p>", script)


def framed(kind: str, name: str, question: str, body: str, answer: str, script: str = "") -> HTML:
    """Frame of every explorable: question, body and folded answer; `question` is plain text, the other parts HTML."""
    return HTML(
        f'<div class="explorable" id="explore-{name}" data-kind="{kind}">'
        f'<p class="question"><strong>Answer first.</strong> {html.escape(question)}</p>{body}'
        f'<details class="answer"><summary>What you should have noticed</summary>{answer}</details>{script}</div>'
    )


def numbers(values: Any, digits: int = 2) -> str:
    """Numbers as text: 0.50, or (1.0, −0.3) for several."""
    parts = [f"{value:z.{digits}f}".replace("-", "−") for value in torch.as_tensor(values).flatten().tolist()]
    return parts[0] if len(parts) == 1 else f"({', '.join(parts)})"


def _rounded(values: Tensor, digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values.flatten().tolist()]


# --- the scan, step by step -------------------------------------------------------------------------------

TOY_CHUNK = 3


def toy_scan() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, dt, A, B, C of one head for nine frames, p = 2 and n = 3; Δ is large in frame 6 and near zero in frame 3."""
    x = torch.tensor([[2, 1], [-1, 2], [3, 3], [1, -2], [2, 0], [1, 1], [-2, 1], [1, 2], [0, -1]])
    dt = torch.tensor([0.5, 0.3, 0.01, 0.5, 0.2, 3.0, 0.3, 0.5, 0.2])
    B = torch.eye(3)[[0, 1, 2, 1, 0, 2, 0, 1, 2]]
    C = torch.tensor(
        [[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    )
    return x[None, :, None].float(), dt[None, :, None], torch.tensor([-1.0]), B[None], C[None].float()


def scan() -> HTML:
    """The scan of a toy sequence, step by step: the loop's state, the decay matrix and the chunks side by side."""
    x, dt, A, B, C = toy_scan()
    t, q = x.shape[1], TOY_CHUNK
    # Sequence 0 is the toy; in sequence 1 + j only frame j writes. The scan is linear, so these add up to sequence 0.
    x = torch.cat([x, x * torch.eye(t)[:, :, None, None]])
    dt, B, C = (part.expand(t + 1, *part.shape[1:]) for part in (dt, B, C))
    y = ssd.recurrent(x, dt, A, B, C)[:, :, 0]  # (1 + t, t, p)
    states = torch.stack(
        [ssd.recurrent(x[:, :i], dt[:, :i], A, B[:, :i], C[:, :i], return_state=True)[1][:, 0] for i in range(1, t + 1)]
    )  # (t, 1 + t, p, n)
    decays = (dt[0, :, 0] * A).exp()
    L = ssd.decay_matrix((dt[0, :, 0] * A).cumsum(0))
    match = C[0] @ B[0].mT

    def words(i: int, j: int) -> str:
        if j > i:
            return (
                f"Frame {j + 1} comes after frame {i + 1}, so L is 0 here: no output depends on a later frame. "
                f"Frame {i + 1} reads y = {numbers(y[0, i])}."
            )
        factors = " × ".join(numbers(decay) for decay in decays[j + 1 : i + 1])
        left = {0: "no decay yet, L = 1", 1: f"L = {factors}"}.get(i - j, f"L = {factors} = {numbers(L[i, j], 3)}")
        borders = i // q - j // q
        route = (
            f"both frames are in chunk {i // q + 1}, so a score connects them"
            if not borders
            else f"the state carries this over {borders} border{'s' * (borders > 1)}, to chunk {i // q + 1}"
        )
        return (
            f"Frame {j + 1} writes Δx = {numbers(dt[0, j, 0] * x[0, j, 0])} at B = {numbers(B[0, j], 0)}. In frame "
            f"{i + 1}, {left}. The match with C = {numbers(C[0, i], 0)} is {numbers(match[i, j], 0)}, so frame "
            f"{j + 1} adds {numbers(y[1 + j, i])} to y = {numbers(y[0, i])}. In chunks of {q}, {route}."
        )

    def setting(i: int, j: int) -> dict[str, Any]:
        here = [[i, j, "here"]]
        path = [[0, k, "path"] for k in range(j + 1, i + 1)]
        so_far = [value if k <= i else None for row in y[0].mT for k, value in enumerate(_rounded(row))]
        return {
            "caption": words(i, j),
            "values": [_rounded(decays) + so_far, _rounded(states[i, 0]), _rounded(states[i, 1 + j]), None, None],
            "marks": [[*path, [0, j, "from"], *([row, i, "here"] for row in range(3))], [], [], here, here],
        }

    frames = [str(k + 1) for k in range(t)]
    table = {"rows": t, "cols": t, "pick": {"row": 0, "col": 1}, "labels": {"row": frames, "col": frames}, "size": 26}
    state = {"rows": 2, "cols": 3, "most": 3, "digits": 2, "size": 40}
    chunk = torch.arange(t) // q
    kinds = (1 + (chunk[:, None] == chunk).int()).tril()  # 0: future, 1: connected by the state, 2: by a score
    return explorable(
        "grids",
        "scan",
        "Frame 6 has a large Δ, so its decay is only 0.05. Which cells of L are therefore close to zero? And what is "
        "left in the state after frame 6?",
        "All cells in rows 6 to 9 and columns 1 to 5 are close to zero, because every path from a frame before 6 to a "
        "frame from 6 on multiplies by that one decay. After it, the state holds almost only the input of frame 6. "
        "Frame 3 is the opposite: its Δ is near zero, so it forgets nothing and writes nothing. Loop, matrix and "
        "chunks give the same y; only the route differs: a score inside a chunk, the state between chunks.",
        {"Frame i, reads": [f"frame {k}" for k in frames], "Frame j, wrote": [f"frame {k}" for k in frames]},
        [setting(i, j) for i in range(t) for j in range(t)],
        start=(4, 1),
        panels=[
            {"rows": 3, "cols": t, "pick": {"col": 0}, "labels": {"col": frames, "row": ["a", "y₁", "y₂"]}, "size": 34,
             "most": 2, "digits": 2, "title": "Loop: decay a, outputs y so far",
             "alt": "Nine decays in a row, those between frame j and frame i marked; below, two rows of outputs."},
            {**state, "title": "State after frame i", "alt": "The state, two rows of three numbers."},
            {**state, "title": "Its part from j", "alt": "The part of the state that frame j wrote."},
            {**table, "title": "Matrix: L, row i, column j", "values": _rounded(L), "most": 1,
             "alt": "The decay matrix, nine by nine, dark where much is left; cell i, j is marked."},
            {**table, "title": f"Chunks of {q}", "values": kinds.flatten().tolist(), "borders": [3, 6],
             "classes": ["", "s1", "s2"], "key": ["", "by the state", "by a score"],
             "alt": "The same cells: scores in three triangles on the diagonal, the rest below by the state."},
        ],
    )  # fmt: skip


# --- Δ and A ----------------------------------------------------------------------------------------------


def decay() -> HTML:
    """Δ and A: how much of a note is left after a pause."""
    steps = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
    rates = (-0.1, -1.0, -3.0, -16.0)

    def setting(dt_sound: float, dt_pause: float, A: float) -> dict[str, Any]:
        trace = demos.note_and_pause(dt_sound, dt_pause, A)
        before, after, last = (100 * float(trace.state[i]) for i in (15, 47, 63))
        return {
            "y": [[_rounded(trace.state)], [_rounded(trace.weights)]],
            "caption": f"{before:.0f} % of the note is left when the pause begins, {after:.0f} % when it ends, and "
            f"{last:.0f} % in the last frame. A frame of sound keeps {100 * math.exp(dt_sound * A):.1f} % of the "
            f"state, a frame of the pause {100 * math.exp(dt_pause * A):.1f} %.",
        }

    frames = {
        "x": list(range(64)), "xlabel": "frame", "xscale": "linear", "xlim": [0, 63], "xticks": [0, 16, 32, 48, 63],
        "most": 1, "shade": [16, 48], "shadeLabel": "pause", "series": [{"name": "state"}],
    }  # fmt: skip
    return explorable(
        "curves",
        "decay",
        "In frame 4, a note adds 1 to a state of one number; frames 16 to 47 are a pause. Which two values of Δ let "
        "the note fade while there is sound but survive the pause? And which Δ in the pause erases it?",
        "Only the product Δ·A matters for the fading. With A = −1, for example, a Δ of 0.1 lets the note fade to a "
        "third while there is sound. A Δ near zero in the pause, such as 0.001, holds the state for every A, and a Δ "
        "of 1 erases it within a few frames. So a head can remember with any A, because it can choose Δ.",
        {
            "Δ while there is sound": [f"Δ = {step:g}" for step in steps],
            "Δ in the pause": [f"Δ = {step:g}" for step in steps],
            "Decay rate of the head": [f"A = {rate:g}".replace("-", "−") for rate in rates],
        },
        [setting(*place) for place in itertools.product(steps, steps, rates)],
        panels=[
            {**frames, "title": "What is left of the note of frame 4",
             "alt": "The state over 64 frames: it jumps to 1 at frame 4 and fades, at one rate in sound and a "
             "different one in the pause."},
            {**frames, "title": "Weight of each frame in the last one",
             "alt": "The last row of the decay matrix over 64 frames: 1 at the last, less for every frame before it."},
        ],
    )  # fmt: skip


# --- chunks -----------------------------------------------------------------------------------------------


def chunk() -> HTML:
    """Cost of the chunked scan at several chunk lengths: arithmetic, time and memory, measured on this machine."""
    lengths = (8, 16, 32, 48, 64, 96, 128, 256)
    runs = demos.chunk_runs(lengths, rounds=3)
    columns = {
        "scores": [run.scores / 1e9 for run in runs],
        "states": [run.states / 1e9 for run in runs],
        "repeated": [run.levels / 1e9 for run in runs],
        "time": [1e3 * run.seconds for run in runs],
        "memory": [run.memory / 1e6 for run in runs],
    }

    def panel(title: str, alt: str, *names: str) -> dict[str, Any]:
        return {
            "title": title, "alt": alt, "x": lengths, "xlabel": "frames in a chunk", "xscale": "log", "xlim": [8, 256],
            "xticks": [8, 16, 32, 64, 128, 256], "most": 1.1 * max(max(columns[name]) for name in names),
            "series": [{"name": name, "y": [round(value, 4) for value in columns[name]]} for name in names],
        }  # fmt: skip

    return explorable(
        "curves",
        "chunk",
        "The amount of work is smallest for chunks of 8 frames. Is the time smallest there too? And at which length "
        "does the memory begin to rise?",
        "No. Short chunks mean many small products and many states, so they take a long time although they need the "
        "least arithmetic. Long chunks need more arithmetic for scores. Beyond about a hundred frames, moreover, a "
        "head that forgets quickly decays to less than 2⁻¹²⁰ within a chunk. This is too small for one product in "
        "float32, so its products are repeated, and time and memory rise together.",
        {"Frames in a chunk": [f"{length} frames" for length in lengths]},
        [
            {
                "mark": i,
                "caption": f"Chunks of {run.chunk} frames: {run.scores / 1e9:.2f} GFLOP of scores, "
                f"{run.states / 1e9:.2f} GFLOP of states, {run.levels / 1e9:.2f} GFLOP of repeated products, "
                f"{1e3 * run.seconds:.0f} ms on the machine that built this page, {run.memory / 1e6:.0f} MB.",
            }
            for i, run in enumerate(runs)
        ],
        start=(0,),
        panels=[
            panel(
                "Work (GFLOP), 2 × 768 frames",
                "Work against the chunk: the scores' rises in proportion, the states' falls a little, the repeated "
                "products' is zero up to about 100 frames and then rises steeply.",
                "scores", "states", "repeated",
            ),
            panel("Time (ms)", "Time against the chunk: high at 8, a valley, higher again at 256.", "time"),
            panel("Memory (MB)", "Memory against the chunk: flat, then rising steeply.", "memory"),
        ],
    )  # fmt: skip


# --- two directions, two axes -----------------------------------------------------------------------------

REACHES = (
    "forwards along time",
    "both ways along time",
    "then along bands too",
    "both ways, but no transpose",
)


def reached(frames: int = 12, bands: int = 8) -> dict[str, Tensor]:
    """Change of every output cell for a change in each input cell: stage → (t, k of the input, t, k of the output).

    The layer is a small `DualPath` with random weights in float64; a value is the largest change of any feature,
    relative to the change of the input cell. The stages are `REACHES`; the last one lacks a transpose on purpose.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        dim = 8
        layer = DualPath(dim, partial(Mamba2, dim, d_state=8, headdim=4, expand=2)).double()
        x = torch.randn(frames, bands, dim, dtype=torch.float64)
        one = torch.eye(frames * bands, dtype=torch.float64).unflatten(1, (frames, bands))
        touched = torch.cat([x[None], x + one[..., None]])  # (1 + cells, t, k, d)

        def along_time(part: torch.nn.Module) -> Tensor:
            sequences = touched.transpose(1, 2).flatten(0, 1)
            return part(sequences).unflatten(0, (-1, bands)).transpose(1, 2)

        outputs = (
            along_time(layer.time.forwards),
            along_time(layer.time),
            layer(touched),
            layer.time(touched.reshape(-1, frames, dim)).reshape(touched.shape),
        )
        changes = ((y[1:] - y[0]).abs().amax(-1).unflatten(0, (frames, bands)) for y in outputs)
        return dict(zip(REACHES, changes, strict=True))


def _range(name: str, indices: Tensor, count: int) -> str:
    """Indices from 0 as text that counts from 1: band 3, bands 2 to 5, all 8 bands."""
    first, last = int(indices.min()) + 1, int(indices.max()) + 1
    if first == last:
        return f"{name} {first}"
    return f"all {count} {name}s" if last - first == count - 1 else f"{name}s {first} to {last}"


def reach() -> HTML:
    """Dual path: touch a cell of the time-band grid, and see which cells change."""
    stages = reached()
    frames, bands = stages[REACHES[0]].shape[:2]

    def setting(stage: str, band: int, frame: int) -> dict[str, Any]:
        change = stages[stage][frame, band].mT  # (k, t)
        in_bands, in_frames = change.nonzero(as_tuple=True)
        tint = (9 + change.log10()).round().clamp(1, 9).where(change > 0, torch.zeros(()))  # a step per factor of ten
        return {
            "caption": f"You touch band {band + 1} in frame {frame + 1}; {stage}, {len(in_bands)} of {bands * frames} "
            f"cells change: {_range('band', in_bands, bands)}, {_range('frame', in_frames, frames)}.",
            "values": ["".join(str(int(value)) for value in tint.flatten())],
            "marks": [[[band, frame, "here"]]],
        }

    labels = {"row": [str(k + 1) for k in range(bands)], "col": [str(k + 1) for k in range(frames)]}
    return explorable(
        "grids",
        "reach",
        "You change one cell. Which cells change after one mixer along time, after two, and after the block along "
        "bands? And which cells change if a transpose is missing?",
        "Forwards along time, only later frames of the same band change; both ways, the whole band; and the block "
        "along bands spreads this to every cell. Without the transpose, a sequence runs through cells that are "
        "neighbours in memory, so it steps through the bands and reaches only one or two frames. No error is raised.",
        {
            "What has run": REACHES,
            "Band you touch": [f"band {k}" for k in labels["row"]],
            "Frame you touch": [f"frame {k}" for k in labels["col"]],
        },
        [setting(*place) for place in itertools.product(REACHES, range(bands), range(frames))],
        start=(0, 3, 4),
        panels=[
            {"rows": bands, "cols": frames, "pick": {"row": 1, "col": 2}, "labels": labels, "up": True, "size": 40,
             "title": "Touch a cell. A shade lighter: a tenth", "most": 9,
             "alt": "A grid of bands and frames: cells that change are coloured, the more the stronger the colour."}
        ],
    )  # fmt: skip


# --- roofline ---------------------------------------------------------------------------------------------

MACHINES = {"CPU": (100e9, 10e9, 4)} | {
    name: (GPUS[name].bfloat16, GPUS[name].bandwidth, 2) for name in ("RTX 4090", "A100 80 GB")
}
"""Name → FLOP/s, bytes/s and bytes per number, for an example CPU and two GPUs."""


def scan_cost(chunk: int, fused: bool, *, h: int = 16, p: int = 64, n: int = 128) -> tuple[float, float]:
    """FLOPs per frame of the chunked scan, and how many numbers it moves per frame, by the book's cost model.

    Without fusion, the scores are moved eight times and the states nine times. With fusion, the states are moved four
    times and the scores not at all. The inputs and the output are moved once. The default sizes are the published
    model's.
    """
    scores, states = h * chunk, h * p * n / chunk
    moved = 2 * h * p + 2 * n + h + (4 * states if fused else 8 * scores + 9 * states)
    return 2 * chunk * (n + h * p) + 4 * n * h * p, moved


def roofline() -> HTML:
    """Roofline: where the scan is memory-bound, for three machines, fused or not, and several chunk lengths."""
    chunks, x = (16, 32, 64, 128, 256), [round(10 ** (i / 10), 3) for i in range(31)]

    def setting(machine: str, fused: bool, chunk: int) -> dict[str, Any]:
        peak, bandwidth, width = MACHINES[machine]
        flops, moved = scan_cost(chunk, fused)
        intensity, ridge = flops / (moved * width), peak / bandwidth
        reach = min(1, intensity / ridge)
        return {
            "y": [[[round(100 * min(1, value / ridge), 2) for value in x]]],
            "at": [round(intensity, 2), round(100 * reach, 2)],
            "caption": f"{machine}, {'fused' if fused else 'unfused'}, chunks of {chunk}: {flops / 1e6:.2f} MFLOP and "
            f"{moved * width / 1e3:.0f} kB per frame, so {intensity:.1f} FLOPs per byte. The ridge point is at "
            f"{ridge:.0f}: the scan is {'compute' if reach == 1 else 'memory'}-bound and reaches at most "
            f"{100 * reach:.0f} % of the peak, {1e9 * flops / (reach * peak):,.0f} ns per frame. Computed, not run.",
        }

    return explorable(
        "curves",
        "roofline",
        "Fusing moves fewer bytes for the same arithmetic. On which of the three machines does it make the scan "
        "compute-bound? And should the chunk be short or long on a GPU, without fusing and with it?",
        "Only on the CPU (here one with 100 GFLOP/s and 10 GB/s), only from chunks of 64 on. The ridge points of the "
        "GPUs are so far to the right that the scan is memory-bound in every position, so the fastest chunk there is "
        "the one that moves the fewest bytes: unfused about 128, because longer chunks move more scores; fused the "
        "longest of these, because the scores stay on the chip.",
        {"Machine": list(MACHINES), "Kernel": ["unfused", "fused"], "Chunk": [f"{q} frames" for q in chunks]},
        [setting(*place) for place in itertools.product(MACHINES, (False, True), chunks)],
        start=(2, 0, 2),
        panels=[
            {"title": "Attainable speed (% of the peak)", "x": x, "xlabel": "FLOPs per byte", "xscale": "log",
             "xlim": [1, 1000], "xticks": [1, 3, 10, 30, 100, 300, 1000], "most": 110, "series": [{"name": "roof"}],
             "alt": "The roofline of the machine, a slope and then a flat roof, with a dot for the scan."}
        ],
    )  # fmt: skip


# --- precision --------------------------------------------------------------------------------------------


def significand(value: float, bits: int) -> float:
    """A number rounded to `bits` significand bits, ties to even: 24 for float32, 11 float16, 8 bfloat16 (in range)."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)


def bits() -> HTML:
    """A decay stored with fewer bits: how an input fades over eight seconds."""
    sizes, losses = tuple(range(6, 25)), (0.1, 0.03, 0.01, 0.003, 0.001)
    types = {8: " (bfloat16)", 11: " (float16)", 24: " (float32)"}
    frames = range(0, 801, 20)

    def words(size: int) -> str:
        return f"{size} bits{types.get(size, '')}"

    def setting(size: int, loss: float) -> dict[str, Any]:
        exact = math.exp(-loss)
        stored = significand(exact, size)
        half = "it never forgets" if stored == 1 else f"its half-life is {math.log(0.5) / math.log(stored):,.0f} frames"
        return {
            "y": [[[round(decay**frame, 4) for frame in frames] for decay in (exact, stored)]],
            "caption": f"With {words(size)}, the decay {exact:.7f} is stored as {stored:.7f}. With the exact decay "
            f"the head has a half-life of {math.log(2) / loss:,.0f} frames; with the stored one, {half}.",
        }

    return explorable(
        "curves",
        "bits",
        "A head loses 0.1 % of its state per frame. How many significand bits does its decay need for the two curves "
        "to agree four seconds later, in frame 400?",
        "With the 8 bits of bfloat16 the decay becomes exactly 1, and the head never forgets; with 9, its half-life "
        "is 355 instead of 693 frames. From 10 bits on the curves nearly agree. For a head that loses 10 % per frame, "
        "8 bits are enough: the slower a head is, the closer its decay is to 1, and the finer the spacing must be.",
        {"Significand bits": [words(size) for size in sizes],
         "Loss per frame, Δ|A|": [f"{100 * loss:g} %" for loss in losses]},
        [setting(*place) for place in itertools.product(sizes, losses)],
        start=(18, 4),
        panels=[
            {"title": "What is left of an input", "x": list(frames), "xlabel": "frame", "xscale": "linear",
             "xlim": [0, 800], "xticks": [0, 200, 400, 600, 800], "most": 1.2,
             "series": [{"name": "exact"}, {"name": "stored"}],
             "alt": "Two curves over 800 frames: what is left with the exact decay, and with the stored one."}
        ],
    )  # fmt: skip
