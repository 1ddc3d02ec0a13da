"""Explorables with audio: their scores against closed forms and the metrics themselves."""

from __future__ import annotations

import copy
import json
import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from IPython.display import HTML
from torch.nn import functional

from bsmamba2 import BSMamba2, ModelConfig, mamba2, metrics
from bsmamba2.bands import published_bands
from bsmamba2.checkpoints import bundled_checkpoint, load_checkpoint
from bsmamba2.dual_path import DualPath
from bsmamba2.spectrogram import istft, stft
from bsmamba2.synth import Song, excerpt, synthesise
from bsmamba2.teaching import demos, listening, plotting

SUNG = partial(synthesise, 7, seconds=3.0, occupancy=1.0, sample_rate=8_000)


def embedded(shown: HTML) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The data that an element carries for the script: common, settings."""
    data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', shown.data)[0])
    return data["common"], data["settings"]


def test_a_leak_moves_each_metric_as_it_should() -> None:
    song = SUNG()
    before, quiet = listening.leaking(song, 1, 0)
    after, loud = listening.leaking(song, 1, 10)
    rate = song.sample_rate
    assert torch.equal(quiet[:, :rate], loud[:, :rate])
    assert after["cSDR"] == before["cSDR"]
    assert after["silence leakage"] - before["silence leakage"] == pytest.approx(10, abs=0.01)
    assert before["silence leakage"] == pytest.approx(-20, abs=0.01)
    leak = 0.1 * (song.mixture - song.vocals)
    sung, rest = (float(part.double().square().sum()) for part in (leak[:, :rate], leak[:, rate:]))
    fall = 10 * math.log10((sung + 10 * rest) / (sung + rest))
    assert before["uSDR"] - after["uSDR"] == pytest.approx(fall, abs=0.01)


def test_the_answer_about_the_leak_is_true() -> None:
    common, settings = embedded(listening.leak())
    assert len(settings) == len(listening.SUNG) * len(listening.LEAKS)
    change = [[now - before for now, before in zip(s["values"], s["before"], strict=True)] for s in settings]
    csdr, usdr, si_sdr, leakage = (list(column) for column in zip(*change, strict=True))
    assert set(csdr) == {0}
    assert leakage == pytest.approx(list(listening.LEAKS) * len(listening.SUNG), abs=0.05)
    assert usdr == pytest.approx(si_sdr, abs=0.1)
    one, six = dict(zip(listening.LEAKS, usdr, strict=False)), dict(zip(listening.LEAKS, usdr[-6:], strict=True))
    assert one[4] < -3
    assert six[8] > -3 > six[12]
    assert common["names"] == list(listening.METRICS)
    assert len({setting["sound"] for setting in settings}) == len(settings)
    for setting, values in zip(settings, change, strict=True):
        assert f"uSDR by {values[1]:z.1f} dB".replace("-", "−")[:-5] in setting["caption"]


def test_bands_score_what_one_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    song = synthesise(7, seconds=1.0, occupancy=0.7)
    monkeypatch.setattr(listening, "excerpt", lambda: song)
    common, settings = embedded(listening.bands())
    assert common["still"]["edges"] == [round(edge) for edge in demos.band_edges(published_bands())]
    published = metrics.usdr(song.vocals, demos.oracle_band_gain(song, published_bands()))
    scores = [
        float(re.search(r"score (.*?) dB; with the published table, (.*?) dB", s["caption"])[1]) for s in settings
    ]
    assert scores[0] == min(scores) < scores[-1]
    assert f"published table, {published:.1f} dB" in settings[0]["caption"]
    assert [len(setting["edges"]) - 1 for setting in settings] == [8, 12, 16, 20, 24, 32, 40, 48, 62, 80, 96]
    assert "The one at 100 Hz is 172 Hz wide" in settings[0]["caption"]


def test_occupancy_says_what_can_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    song: Song = SUNG()

    def run(model: Any, share: float) -> demos.OccupancyRun:
        return demos.OccupancyRun(song, song.mixture, 3.0 + share, -2.0, -12.0 if share < 1 else math.nan)

    monkeypatch.setattr(demos, "at_occupancy", run)
    common, settings = embedded(listening.occupancy(None))
    assert (
        settings[0]["caption"] == "0% of the time is sung. Where nobody sings, the estimate is 12 dB below the mixture."
    )
    assert settings[-1]["caption"] == (
        "100% of the time is sung. The estimate has 4.0 dB uSDR, the mixture −2.0 dB, and silence 0 dB. "
    )
    assert [len(setting["parts"]) for setting in settings] == [3] * 6
    assert common["labels"] == ["Mixture", "Model output", "Ground truth"]


# --- half-lives -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halflife() -> HTML:
    return listening.halflife()


def test_half_lives_are_those_of_the_trained_model(halflife: HTML) -> None:
    """The curves against Δ read from the projection's own output, and products of decays from frame to frame."""
    common, settings = embedded(halflife)
    model, song = load_checkpoint(bundled_checkpoint()), excerpt()
    mixer, outputs = model.layers[-1].time.forwards.mixer, []
    mixer.in_proj.register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.inference_mode():
        model(song.mixture[None])
    dt = functional.softplus(outputs[0][..., -6:] + mixer.dt_bias).mean(0)
    decay = (-dt * mixer.A_log.exp()).exp()  # (t, h)
    assert len(settings) == 3 * 31
    for head, moment in ((1, 50), (2, 50), (2, 100), (5, 200)):
        setting = settings[31 * (1, 2, 5).index(head) + moment // 10]
        half_life, left = (torch.tensor(curve[0]) for curve in setting["y"])
        torch.testing.assert_close(0.5 ** (0.02 / half_life), decay[::2, head - 1], rtol=0.03, atol=0)
        expected = torch.cat([torch.zeros(moment), torch.ones(1), decay[moment + 1 :, head - 1].cumprod(0)])
        torch.testing.assert_close(left, expected[::2], rtol=0, atol=2e-3)
        assert common["panels"][0]["x"][setting["mark"]] == pytest.approx(0.02 * moment)
        assert f"{100 * expected[-1]:.0f} % is left at the end" in setting["caption"]
    assert "At 2.4 s, nobody sings, and head 2" in settings[31 + 12]["caption"]


def test_the_answer_about_half_lives_is_true(halflife: HTML) -> None:
    kept = [int(share) for share in re.findall(r"(\d+) %", re.findall(r"<details.*?</details>", halflife.data)[0])]
    assert kept[0] == 0
    assert kept[1] > 90
    assert 40 < kept[2] < 60
    common, settings = embedded(halflife)
    pause, back = common["panels"][0]["shade"]
    x = torch.tensor(common["panels"][0]["x"])
    resting, curve = (x > pause) & (x < back), torch.tensor(settings[31]["y"][0][0])
    assert 5 < curve[resting].median() / curve[~resting].median() < 20
    assert max(settings[0]["y"][0][0]) < 0.5


# --- blind tests ------------------------------------------------------------------------------------------


def guesses(shown: HTML) -> tuple[dict[str, str], dict[str, str]]:
    """By label: the right choice, and the words of the answer."""
    right = re.findall(r"<label[^>]*>(.*?)</label><select[^>]* data-right=\"(.*?)\"", shown.data)
    return dict(right), dict(re.findall(r"<li>(.*?): (.*?)</li>", shown.data))


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The sounds of the last player, by label."""
    last: dict[str, torch.Tensor] = {}

    def audio(signals: dict[str, torch.Tensor]) -> HTML:
        last.clear()
        last.update(signals)
        return HTML('<div class="stems"></div>')

    monkeypatch.setattr(plotting, "audio", audio)
    return last


def test_a_blind_sound_has_the_score_that_is_right(
    played: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    song = SUNG()
    estimate = 0.8 * song.vocals + 0.3 * (song.mixture - song.vocals)
    run = demos.OccupancyRun(song, estimate, metrics.usdr(song.vocals, estimate), 0.0, 0.0)
    monkeypatch.setattr(demos, "at_occupancy", lambda *_, **__: run)
    shown = listening.blind(None)
    right, words = guesses(shown)
    assert right == words == dict(zip(right, ("9 dB", "3 dB", "12 dB", "6 dB"), strict=True))
    assert re.findall(r"<option[^>]*>(.*?)</option>", shown.data)[:5] == ["no guess", "3 dB", "6 dB", "9 dB", "12 dB"]
    assert list(played) == ["true vocals", *right]
    for label, choice in right.items():
        score = metrics.usdr(song.vocals, played[label])
        assert score == pytest.approx(float(choice.removesuffix(" dB")), abs=0.01)


def test_one_of_the_faulty_sounds_is_correct(played: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    song = synthesise(2029, seconds=3.0)
    scores = {"correct": 10.0, "a": 3.0, "b": 10.2, "c": 9.7, "d": 10.0, "e": 4.0, "f": 10.1}
    noise = torch.randn(song.vocals.shape, generator=torch.Generator().manual_seed(0))
    noise *= song.vocals.norm() / noise.norm()
    estimates = {name: song.vocals + 10 ** (-score / 20) * noise for name, score in scores.items()}
    monkeypatch.setattr(listening, "planted", lambda model, mixture: estimates)
    shown = listening.faults(None)
    right, words = guesses(shown)
    assert sorted(right.values()) == ["correct"] + 6 * ["faulty"]
    for label, choice in right.items():
        name = words[label].split(", uSDR")[0]
        assert played[label] is estimates[name]
        assert words[label] == f"{name}, uSDR {scores[name]:.1f} dB"
        assert (choice == "correct") == (name == "correct")
    assert "the uSDR differs by at most 0.3 dB" in shown.data


def test_each_fault_is_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same faults, written frame by frame as in the chapter or into the functions of the model."""
    torch.manual_seed(0)
    config = ModelConfig.preset("small", dim=16, depth=1, headdim=16, d_state=8, hop_length=441)
    model, mixture = BSMamba2(config), 0.1 * torch.randn(2, 44_100)
    for block in (model.layers[0].time, model.layers[0].band):
        block.forwards.mixer.dt_bias.data += 3  # a large step, so that the state matters
    for weight in model.mask_estimators.parameters():
        weight.data *= 3  # so that some moduli of the mask exceed 1
    plain = model(mixture[None])[0, 0].detach()

    def scanning(decay: Any, every: int) -> Any:
        def scan(x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
            state, y = torch.zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), torch.empty_like(x)
            for i in range(x.shape[1]):
                state = torch.zeros_like(state) if i % every == 0 else state
                written = torch.einsum("bh,bhp,bn->bhpn", dt[:, i], x[:, i], B[:, i])
                state = decay(torch.exp(dt[:, i] * A))[..., None, None] * state + written
                y[:, i] = torch.einsum("bhpn,bn->bhp", state, C[:, i]) + D[:, None] * x[:, i]
            return y

        changed = copy.deepcopy(model)
        for part in changed.modules():
            if isinstance(part, mamba2.Mamba2):
                part.scan = scan
        return changed(mixture[None])[0, 0]

    def reshaped(layer: DualPath, x: torch.Tensor) -> torch.Tensor:
        b, t, k, d = x.shape
        x = layer.time(x.reshape(b * k, t, d)).reshape(x.shape)
        return layer.band(x.flatten(0, 1)).unflatten(0, (b, t))

    with torch.inference_mode():
        found = listening.planted(model, mixture)
        expected = {"correct": plain}
        expected["state forgotten every 64 frames"] = scanning(lambda decay: decay, 64)
        expected["decay rounded to bfloat16"] = scanning(lambda decay: decay.bfloat16().float(), 10**6)
        with monkeypatch.context() as patch:
            conv = mamba2.causal_conv1d_silu
            patch.setattr(mamba2, "causal_conv1d_silu", lambda *args: functional.silu(conv(*args)))
            expected["SiLU applied twice"] = model(mixture[None])[0, 0]
        with monkeypatch.context() as patch:
            patch.setattr(DualPath, "forward", reshaped)
            expected["frames and bands scrambled"] = model(mixture[None])[0, 0]
        X = stft(mixture[None], config.n_fft, config.hop_length)
        M = model.masks(X)[0, 0]
        for name, Y in {
            "mask multiplied part by part": M.real * X[0].real + 1j * M.imag * X[0].imag,
            "modulus of the mask limited to 1": torch.polar(M.abs().clamp(max=1), M.angle()) * X[0],
        }.items():
            expected[name] = istft(Y, mixture.shape[1], config.n_fft, config.hop_length)
    assert found.keys() == expected.keys()
    for name, estimate in expected.items():
        error = float((found[name] - estimate).norm() / estimate.norm())
        change = float((estimate - plain).norm() / plain.norm())
        assert error < 1e-3, name
        assert name == "correct" or change > 5 * error, f"{name} cannot be told from the correct output"
