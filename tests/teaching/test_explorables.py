"""Explorables: what they show against products, closed forms and PyTorch's own types; and the element of a page."""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

import pytest
import torch
from IPython.display import HTML

from bsmamba2 import ssd
from bsmamba2.teaching import demos, explorables


def embedded(shown: HTML) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The data that an element carries for the script: common, settings."""
    found = re.findall(r'<script type="application/json">(.*?)</script>', shown.data)
    assert len(found) == 1
    data = json.loads(found[0])
    return data["common"], data["settings"]


# --- the element ------------------------------------------------------------------------------------------


def test_explorable_carries_its_settings_and_starts_in_the_middle() -> None:
    settings = [{"caption": f"{a} & {b} </script>"} for a in "xyz" for b in "uv"]
    sliders = {"A <b>": list("xyz"), "B": list("uv")}
    shown = explorables.explorable("curves", "one", "Why <i>?", "Because <b>.", sliders, settings, panels=[])
    assert embedded(shown) == ({"panels": []}, settings)
    assert 'aria-live="polite">y &amp; v &lt;/script&gt;</p>' in shown.data
    assert re.findall(r'<label for="(.*?)">(.*?)</label><input type="range" id="(.*?)"', shown.data) == [
        ("explore-one-0", "A &lt;b&gt;", "explore-one-0"),
        ("explore-one-1", "B", "explore-one-1"),
    ]
    question, answer = html.escape("Why <i>?"), html.escape("Because <b>.")
    assert shown.data.index(question) < shown.data.index("<input") < shown.data.index(answer)
    assert re.search(rf"<details[^>]*><summary>[^<]+</summary><p>{answer}</p></details>", shown.data)


def test_explorable_starts_where_it_should() -> None:
    settings = [{"caption": f"{a}{b}"} for a in "xyz" for b in "uv"]
    sliders = {"A": list("xyz"), "B": list("uv")}
    shown = explorables.explorable("curves", "one", "?", "!", sliders, settings, start=(2, 0)).data
    assert 'aria-live="polite">zu</p>' in shown
    assert re.findall(r' value="(\d)"', shown) == ["2", "0"]


def test_explorable_wants_every_setting() -> None:
    sliders = {"A": list("xyz"), "B": list("uv")}
    with pytest.raises(ValueError, match="6 combinations of positions, and there are 5 settings"):
        explorables.explorable("curves", "one", "?", "!", sliders, [{"caption": ""}] * 5)


def test_numbers_are_words() -> None:
    assert explorables.numbers(-0.001) == "0.00"
    assert explorables.numbers(torch.tensor([1.0, -0.25]), 1) == "(1.0, −0.2)"


# --- the scan ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scan() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return embedded(explorables.scan())


def test_loop_matrix_and_chunks_of_the_toy_are_equal(scan: Any) -> None:
    """What the loop's panel has in the last frame is the output of all three forms."""
    _, settings = scan
    frames = torch.tensor(settings[-1]["values"][0]).reshape(3, 9)
    toy = explorables.toy_scan()
    for y in (ssd.recurrent(*toy), ssd.matrix(*toy), ssd.chunked(*toy, chunk=explorables.TOY_CHUNK)):
        torch.testing.assert_close(frames[1:], y[0, :, 0].T, rtol=0, atol=1e-3)
    torch.testing.assert_close(frames[0], (-toy[1][0, :, 0]).exp(), rtol=0, atol=1e-3)


def test_cells_of_the_toy_follow_the_formula(scan: Any) -> None:
    """L_ij is the product of the decays from j + 1 to i; the part of frame j is L_ij Δ_j x_j B_jᵀ."""
    common, settings = scan
    x, dt, _, B, _ = (part.squeeze() for part in explorables.toy_scan())
    L = torch.tensor(common["panels"][3]["values"]).reshape(9, 9)
    for i, j in ((0, 0), (4, 1), (8, 0), (8, 5), (6, 6), (2, 7)):
        left = math.exp(-float(dt[j + 1 : i + 1].sum())) if i >= j else 0.0
        assert L[i, j] == pytest.approx(left, abs=1e-3)
        part = left * dt[j] * torch.outer(x[j], B[j])
        torch.testing.assert_close(
            torch.tensor(settings[9 * i + j]["values"][2]).reshape(2, 3), part, rtol=0, atol=2e-3
        )


def test_parts_add_up_to_the_state(scan: Any) -> None:
    _, settings = scan
    for i in range(9):
        row = settings[9 * i : 9 * i + 9]
        parts = torch.tensor([setting["values"][2] for setting in row]).sum(0)
        torch.testing.assert_close(parts, torch.tensor(row[0]["values"][1]), rtol=0, atol=5e-3)


def test_the_answer_about_the_sixth_frame_is_true(scan: Any) -> None:
    common, settings = scan
    L = torch.tensor(common["panels"][3]["values"]).reshape(9, 9)
    assert L[5:, :5].max() <= 0.05
    assert L.tril()[5:, 5:].diagonal().min() == 1
    assert L[4, :5].min() > 0.2
    after, of_six = (torch.tensor(settings[9 * 5 + 5]["values"][k]) for k in (1, 2))
    assert (after - of_six).norm() < 0.05 * after.norm()


def test_words_of_the_scan(scan: Any) -> None:
    _, settings = scan
    assert "comes after frame 1, so L is 0" in settings[4]["caption"]
    caption = settings[9 * 6 + 4]["caption"]  # frame 5 in frame 7
    assert "L = 0.05 × 0.74 = 0.037" in caption
    assert "over 1 border, to chunk 3" in caption
    assert "L = 0.61. The match" in settings[9 * 7 + 6]["caption"]
    assert "both frames are in chunk 3, so a score connects them" in settings[9 * 7 + 6]["caption"]
    kinds = torch.tensor(scan[0]["panels"][4]["values"]).reshape(9, 9)
    assert [int((kinds == kind).sum()) for kind in (0, 1, 2)] == [36, 27, 18]


def test_the_path_is_lit(scan: Any) -> None:
    marks = scan[1][9 * 6 + 3]["marks"]
    assert [col for row, col, kind in marks[0] if kind == "path"] == [4, 5, 6]
    assert [[row, col] for row, col, _ in marks[3]] == [[6, 3]]


# --- dual path --------------------------------------------------------------------------------------------


def test_cells_that_are_reached() -> None:
    forwards, both, layer, scrambled = (change > 0 for change in explorables.reached(5, 3).values())
    t, k = torch.meshgrid(torch.arange(5), torch.arange(3), indexing="ij")
    same_band = k[:, :, None, None] == k
    assert torch.equal(forwards, same_band & (t >= t[:, :, None, None]))
    assert torch.equal(both, same_band)
    assert layer.all()
    sequence = torch.arange(15).reshape(3, 5)  # cells in the order of memory, cut into sequences of five frames
    together = torch.zeros(15, 15, dtype=torch.bool)
    for row in sequence:
        together[row[:, None], row] = True
    assert torch.equal(scrambled, together.reshape(5, 3, 5, 3))


def test_words_of_the_reach() -> None:
    common, settings = embedded(explorables.reach())
    rows, cols = (common["panels"][0][name] for name in ("rows", "cols"))
    assert len(settings) == 4 * rows * cols
    for number, words in (
        (
            3 * cols + 4,
            "You touch band 4 in frame 5; forwards along time, 8 of 96 cells change: band 4, frames 5 to 12.",
        ),
        (
            rows * cols,
            "You touch band 1 in frame 1; both ways along time, 12 of 96 cells change: band 1, all 12 frames.",
        ),
        (2 * rows * cols + 50, "96 of 96 cells change: all 8 bands, all 12 frames."),
        (4 * rows * cols - 1, "12 of 96 cells change: all 8 bands, frames 11 to 12."),
    ):
        assert settings[number]["caption"].endswith(words)
        coloured = sum(digit != "0" for digit in settings[number]["values"][0])
        assert f"{coloured} of 96" in words


# --- the others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.bfloat16), (11, torch.float16), (24, torch.float32)])
def test_significand_rounds_as_the_type_does(bits: int, dtype: torch.dtype) -> None:
    values = [*torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist(), 0.998046875]
    for value in values:
        assert explorables.significand(value, bits) == float(torch.tensor(value, dtype=torch.float64).to(dtype))


def test_bits_of_a_decay() -> None:
    common, settings = embedded(explorables.bits())
    by_words = {setting["caption"]: setting["y"][0] for setting in settings}
    assert len(by_words) == 19 * 5
    slow = [setting for setting in settings if "half-life of 693 frames" in setting["caption"]]
    assert ["never forgets" in setting["caption"] for setting in slow] == [True] * 3 + [False] * 16
    assert "its half-life is 355 frames" in slow[3]["caption"]
    middle = common["panels"][0]["x"].index(400)
    gaps = [abs(exact[middle] - stored[middle]) for exact, stored in (setting["y"][0] for setting in slow)]
    assert gaps[2] > 0.3
    assert max(gaps[4:]) < 0.02
    assert slow[0]["y"][0][0][middle] == pytest.approx(math.exp(-0.4), abs=1e-4)


def test_decay_shows_the_trace() -> None:
    _, settings = embedded(explorables.decay())
    assert len(settings) == 6 * 6 * 4
    first = demos.note_and_pause(0.001, 0.001, -0.1)
    assert settings[0]["y"][0][0] == pytest.approx(first.state.tolist(), abs=1e-3)
    kept = settings[(3 * 6 + 0) * 4 + 1]["caption"]  # Δ = 0.1 in sound, 0.001 in the pause, A = −1
    lost = settings[(3 * 6 + 5) * 4 + 1]["caption"]
    before = 100 * math.exp(-0.1 * 11)
    assert f"{before:.0f} % of the note is left when the pause begins, {before * math.exp(-0.032):.0f} % when" in kept
    assert "0 % when it ends" in lost


def test_chunk_shows_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(lengths: list[int], rounds: int) -> list[demos.ChunkRun]:
        return [demos.ChunkRun(q, 10**9 * q, 2 * 10**9, 0, q / 1000, 10**6 * q) for q in lengths]

    monkeypatch.setattr(demos, "chunk_runs", runs)
    common, settings = embedded(explorables.chunk())
    assert settings[1]["caption"].startswith("Chunks of 16 frames: 16.00 GFLOP of scores, 2.00 GFLOP of states")
    assert "16 ms on the machine that built this page, 16 MB" in settings[1]["caption"]
    assert common["panels"][1]["series"][0]["y"][settings[1]["mark"]] == 16


def test_cost_of_the_scan_has_the_flops_that_run() -> None:
    heads, headdim, d_state = 4, 8, 16
    inputs = demos.scan_inputs(1, 64, heads=heads, headdim=headdim, d_state=d_state)
    for run in demos.chunk_runs([8, 16, 32], inputs, rounds=1):
        flops, _ = explorables.scan_cost(run.chunk, False, h=heads, p=headdim, n=d_state)
        states = 4 * d_state * heads * headdim  # the first chunk reads none, and the last makes none
        assert 64 * flops == run.scores + run.states + run.chunk * states


def test_roofline_is_what_the_book_measured() -> None:
    """Chapter 10 counts 141 and 59 MB for 768 frames in chunks of 64; the model, which leaves copies out, over half."""
    for fused, megabytes in ((False, 141), (True, 59)):
        assert 0.5 < explorables.scan_cost(64, fused)[1] * 4 * 768 / 1e6 / megabytes < 1
    common, settings = embedded(explorables.roofline())
    assert len(settings) == 3 * 2 * 5
    bound = [setting["caption"].split("the scan is ")[1].split("-bound")[0] for setting in settings]
    assert bound == ["memory"] * 7 + ["compute"] * 3 + ["memory"] * 20
    times = [int(re.search(r"([\d,]+) ns", setting["caption"])[1].replace(",", "")) for setting in settings]
    assert times[10:15].index(min(times[10:15])) == 3
    assert times[15:20] == sorted(times[15:20], reverse=True)
    for setting in settings:  # the dot lies on the roof
        where, height = setting["at"]
        ridge = float(re.search(r"ridge point is at ([\d,]+)", setting["caption"])[1])
        assert height == pytest.approx(min(100, 100 * where / ridge), rel=0.01)
    assert common["panels"][0]["x"][-1] == 1000
