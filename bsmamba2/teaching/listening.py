"""Explorables with audio; see `bsmamba2.teaching.explorables`."""

from __future__ import annotations

import copy
import html
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from IPython.display import HTML
from torch import Tensor
from torch.nn import functional

from .. import metrics, ssd
from ..bands import generate_bands, published_bands
from ..checkpoints import bundled_checkpoint, load_checkpoint
from ..dual_path import DualPath
from ..experiments import dynamics
from ..kernels import restore
from ..mamba2 import Mamba2
from ..model import BSMamba2
from ..spectrogram import istft, stft
from ..synth import Song, excerpt, synthesise
from . import demos, plotting
from .explorables import explorable, framed, numbers

# --- bands ------------------------------------------------------------------------------------------------


def bands() -> HTML:
    """Band tables from `generate_bands`, drawn above the published table, each with the uSDR of its best gains."""
    counts = (8, 12, 16, 20, 24, 32, 40, 48, 62, 80, 96)
    song = excerpt()
    tables = {count: generate_bands(count) for count in counts}
    tables[0] = published_bands()
    estimates = {count: demos.oracle_band_gain(song, widths) for count, widths in tables.items()}
    scores = {count: metrics.usdr(song.vocals, estimate) for count, estimate in estimates.items()}
    gain = 0.9 / float(song.vocals.abs().max())

    def edges(count: int) -> list[int]:
        return [round(edge) for edge in demos.band_edges(tables[count])]

    def setting(count: int) -> dict[str, Any]:
        at = [demos.band_width_at(tables[count], hertz) for hertz in (100, 1_000, 10_000)]
        return {
            "name": f"{count} bands by the rule",
            "edges": edges(count),
            "caption": f"{count} bands. The one at 100 Hz is {at[0]:,.0f} Hz wide, the one at 1 kHz {at[1]:,.0f} Hz, "
            f"and the one at 10 kHz {at[2]:,.0f} Hz. With the best gain for each band and frame, the excerpt's vocals "
            f"score {scores[count]:.1f} dB; with the published table, {scores[0]:.1f} dB.",
            "sound": plotting.sound(
                estimates[count].mean(0, keepdim=True)[:, : 3 * song.sample_rate], song.sample_rate, gain=gain
            ),
        }

    return explorable(
        "bands",
        "bands",
        "One gain per band and frame can only turn a whole band up or down. How many bands are needed until you "
        "hardly hear the accompaniment any more? Is the published table better than a table by the rule with 62 bands?",
        f"The score rises steadily, from {scores[8]:.1f} dB with 8 bands to {scores[62]:.1f} dB with 62. Up to 96 "
        f"bands it gains another {scores[96] - scores[62]:.1f} dB, and the model would cost about 50 % more. "
        f"The published table scores {scores[0]:.1f} dB, so the rule is nearly as good at the same size. The model is "
        "not limited to one gain: it estimates a separate mask value for every bin.",
        {"Number of bands": [f"{count} bands" for count in counts]},
        [setting(count) for count in counts],
        start=(0,),
        panel={
            "title": "Dashes: 100 Hz, 1 and 10 kHz",
            "alt": "Two rows of blocks over frequency: the bands that the slider sets, and the 62 published ones.",
            "xlabel": "frequency (Hz), logarithmic above 1 kHz",
            "xscale": "hertz",
            "xlim": [0, 22_050],
            "xticks": [0, 250, 500, 1000, 2000, 4000, 8000, 16_000],
        },
        still={"name": "the 62 published bands", "edges": edges(0)},
        marks=[100, 1_000, 10_000],
        label="Three seconds with the best gain for each of these bands",
    )


# --- which metric notices a leak --------------------------------------------------------------------------

LEAKS = (0, 4, 8, 12, 16, 20)
SUNG = (1, 2, 4, 6)
METRICS = ("cSDR", "uSDR", "SI-SDR", "silence leakage")


def leaking(song: Song, sung: int, louder: float) -> tuple[dict[str, float], Tensor]:
    """The `METRICS` in dB of an estimate whose leak is `louder` dB louder where nobody sings, and the estimate.

    The estimate is the voice plus a tenth of the accompaniment. The song should contain singing throughout, because its
    voice is kept in the first `sung` seconds and silenced after them.
    """
    end = sung * song.sample_rate
    voice, accompaniment = song.vocals.clone(), song.mixture - song.vocals
    voice[:, end:] = 0
    leak = 0.1 * accompaniment
    leak[:, end:] *= 10 ** (louder / 20)
    estimate, mixture = voice + leak, voice + accompaniment
    values = (
        metrics.csdr(voice, estimate, song.sample_rate),
        metrics.usdr(voice, estimate),
        metrics.si_sdr(voice, estimate),
        metrics.silence_leakage(voice, estimate, mixture, song.sample_rate).relative,
    )
    return dict(zip(METRICS, values, strict=True)), estimate


def leak() -> HTML:
    """Leak and occupancy: turn up the leak where nobody sings, and see which metrics change."""
    song = synthesise(1_000_007, seconds=7.0, occupancy=1.0, sample_rate=22_050)
    rate = song.sample_rate
    results = {place: leaking(song, *place) for place in itertools.product(SUNG, LEAKS)}
    gain = 0.9 / max(float(estimate.abs().max()) for _, estimate in results.values())

    def setting(sung: int, louder: int) -> dict[str, Any]:
        (values, estimate), (before, _) = results[sung, louder], results[sung, LEAKS[0]]
        change = ", ".join(f"{name} by {numbers(values[name] - before[name], 1)} dB" for name in METRICS)
        around = estimate.mean(0, keepdim=True)[:, (sung - 1) * rate : (sung + 1) * rate]
        return {
            "caption": f"Somebody sings in {sung} of 7 seconds. With the leak {louder} dB louder in the others, the "
            f"scores change: {change}.",
            "values": [round(value, 2) for value in values.values()],
            "before": [round(value, 2) for value in before.values()],
            "sound": plotting.sound(around, rate, gain=gain),
        }

    return explorable(
        "meters",
        "leak",
        "The estimate becomes louder only where nobody sings. By how many decibels must the leak grow until the uSDR "
        "loses 3 dB, if 6 of 7 seconds are sung? And if only 1 second is sung? Which metric never notices the leak?",
        "About 9 dB with 6 sung seconds, but less than 4 dB with 1. With less singing, this leak is a larger part of "
        "the error, and there is less voice to compare it with. SI-SDR moves with uSDR. cSDR does not change at all, "
        "because it drops these seconds. The silence leakage rises as much as the leak, however much is sung.",
        {
            "How much is sung": [f"{sung} of 7 s" for sung in SUNG],
            "Leak louder by": [f"{louder} dB" for louder in LEAKS],
        },
        [setting(*place) for place in results],
        start=(2, 0),
        names=METRICS,
        panel={
            "title": "Rings: without the extra leak",
            "alt": "Four scores in decibels, each with a ring for no extra leak and a dot for the leak that you set.",
            "xlabel": "dB",
            "xscale": "linear",
            "xlim": [-30, 30],
            "xticks": [-30, -20, -10, 0, 10, 20, 30],
        },
        label="The last sung second, and the first one that is not",
    )


# --- occupancy --------------------------------------------------------------------------------------------


def occupancy(model: BSMamba2) -> HTML:
    """Occupancy: the same accompaniment with different amounts of singing, separated by a model."""
    shares = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
    runs = [demos.at_occupancy(model, share) for share in shares]
    gain = 0.9 / max(float(run.song.mixture.abs().max()) for run in runs)
    labels = ("Mixture", "Model output", "Ground truth")

    def setting(share: float, run: demos.OccupancyRun) -> dict[str, Any]:
        usdr = (
            f"The estimate has {run.usdr:.1f} dB uSDR, the mixture {run.mixture_usdr:.1f} dB, and silence 0 dB. "
            if share
            else ""
        )
        rest = f"Where nobody sings, the estimate is {-run.leakage:.0f} dB below the mixture." if share < 1 else ""
        return {
            "caption": f"{share:.0%} of the time is sung. {usdr}{rest}".replace("-", "−"),
            "parts": [
                {
                    "picture": plotting.thumbnail(signal, loudest=2e3),
                    "sound": plotting.sound(signal.mean(0, keepdim=True), gain=gain),
                    "alt": f"Spectrogram, 0 to 8 kHz over 4 seconds: {label.lower()}, {share:.0%} sung.",
                }
                for label, signal in zip(labels, (run.song.mixture, run.estimate, run.song.vocals), strict=True)
            ],
        }

    return explorable(
        "listen",
        "occupancy",
        "The accompaniment stays the same, and the singer sings less and less. Does the uSDR rise or fall, although "
        "the separation sounds no worse? Which sound is left in the estimate when nobody sings?",
        "With less singing the uSDR falls, because the same leakage is compared with less energy of the voice. When "
        "nobody sings, the correct output is silence and the uSDR has no meaning; the silence leakage still has one.",
        {"How much is sung": [f"{share:.0%}" for share in shares]},
        [setting(share, run) for share, run in zip(shares, runs, strict=True)],
        labels=labels,
    )


# --- half-lives of trained heads --------------------------------------------------------------------------


@torch.inference_mode()
def halflife() -> HTML:
    """Half-lives of three heads of the bundled checkpoint over the real excerpt, and how their states fade."""
    song, model = excerpt(), load_checkpoint(bundled_checkpoint())
    last, frame = len(model.layers) - 1, model.config.hop_length / song.sample_rate  # seconds
    A_log: Tensor = model.layers[last].time.forwards.mixer.A_log  # type: ignore[union-attr,assignment]
    loss = dynamics.record_steps(model, song.mixture)[last, "forwards"].mean(0) * A_log.exp()  # Δ·|A|, (t, h)
    half_lives = math.log(2) * frame / loss
    left = ssd.decay_matrix(-loss.double().T.cumsum(-1))  # (h, t, t)
    sung = dynamics.sung_frames(song, len(loss), model.config.hop_length)
    (_, pause), (back, _) = song.vocal_segments
    heads, moments, phrase, end = (1, 2, 5), range(0, len(loss), 10), round(pause / frame), round(back / frame)

    def setting(head: int, moment: int) -> dict[str, Any]:
        curve = left[head - 1, :, moment]  # (t,)
        later = f"{100 * curve[end]:.0f} % is left when the singer returns, and " if moment < end else ""
        return {
            "y": [[[round(value, 3) for value in values[::2].tolist()]] for values in (half_lives[:, head - 1], curve)],
            "mark": moment // 2,
            "caption": f"At {moment * frame:.1f} s, {'the singer' if sung[moment] else 'nobody'} sings, and head "
            f"{head} has a half-life of {half_lives[moment, head - 1]:.2g} s. Of its state at this moment, {later}"
            f"{100 * curve[-1]:.0f} % is left at the end.",
        }

    first, second, fifth = (f"{100 * left[head - 1, end, phrase]:.0f} %" for head in heads)
    panel = {
        "x": [round(i * frame, 2) for i in range(0, len(loss), 2)], "xlabel": "time (s)", "xscale": "linear",
        "xlim": [0, 6.1], "xticks": list(range(7)), "shade": [pause, back], "shadeLabel": "pause", "series": [{}],
    }  # fmt: skip
    return explorable(
        "curves",
        "halflife",
        f"The singer pauses from {pause:.1f} to {back:.1f} s. How much of its state does each of the three heads keep "
        "through this pause: nearly everything, about half, or nothing? And whose half-life follows the singing?",
        f"Head 1 keeps {first}, head 2 {second} and head 5 {fifth}. The half-life of head 1 is always a fraction of a "
        "second, and that of head 5 always roughly as long as the pause. The half-life of head 2 follows the singing: "
        "it is a few seconds while somebody sings, and about ten times as long in the pause. We computed all of them "
        "from the mean Δ over the 32 bands.",
        {"Head of the last layer": [f"head {head}" for head in heads],
         "Moment": [f"{moment * frame:.1f} s" for moment in moments]},
        [setting(*place) for place in itertools.product(heads, moments)],
        start=(1, 5),
        panels=[
            {**panel, "title": "Half-life (s)", "least": 0.01, "most": 400, "yticks": [0.01, 0.1, 1, 10, 100],
             "alt": "The half-life of the head over six seconds, logarithmic; the pause is shaded, the moment marked."},
            {**panel, "title": "What is left of that state", "most": 1,
             "alt": "A curve that is 1 at the moment and then falls, more slowly the longer the half-life is."},
        ],
        label="The excerpt",
        sound=plotting.sound(song.mixture.mean(0, keepdim=True), song.sample_rate),
    )  # fmt: skip


# --- blind tests ------------------------------------------------------------------------------------------


def blind_test(
    name: str, question: str, answer: str, known: Mapping[str, Tensor], hidden: Sequence[tuple[Tensor, str, str]]
) -> HTML:
    """A blind test: audio players, and a choice to make for each hidden sound before the answer is opened.

    Signals are (c, samples). `known` maps labels to signals; each item of `hidden` contains a signal, its right choice
    and the text for the answer.
    """
    choices = sorted({right for _, right, _ in hidden}, key=lambda right: (len(right), right))  # 9 dB before 12 dB
    options = '<option value="">no guess</option>' + "".join(f"<option>{choice}</option>" for choice in choices)
    sounds, guesses, words = dict(known), "", ""
    for i, (signal, right, what) in enumerate(hidden):
        label = f"Sound {'ABCDEFGH'[i]}"
        sounds[label] = signal
        words += f"<li>{label}: {html.escape(what)}</li>"
        guesses += (
            f'<div class="control"><label for="explore-{name}-{i}">{label}</label>'
            f'<select id="explore-{name}-{i}" data-right="{right}" autocomplete="off">{options}</select>'
            "<span></span></div>"
        )
    return framed(
        "blind",
        name,
        question,
        plotting.audio(sounds).data + guesses,
        f'<p class="caption" aria-live="polite"></p><ul>{words}</ul><p>{html.escape(answer)}</p>',
    )


@torch.inference_mode()
def blind(model: BSMamba2) -> HTML:
    """Four estimates whose scores you guess by ear: the vocals plus a model's error, scaled to four levels."""
    run = demos.at_occupancy(model, 0.75, seconds=3.0)
    vocals, error = run.song.vocals, run.estimate - run.song.vocals
    return blind_test(
        "blind",
        "Four estimates of the same vocals have 3, 6, 9 and 12 dB uSDR. Which one has which score? Choose a score for "
        "each before you open the answer.",
        "From one score to the next, the energy of the error halves. We took the error of the trained model on a song "
        "that it had not been trained on, and scaled it. All four sounds therefore have the same kind of error, only "
        "louder or quieter. Two models with the same uSDR can sound different, because their errors differ in kind.",
        {"true vocals": vocals},
        [(vocals + 10 ** ((run.usdr - score) / 20) * error, f"{score} dB", f"{score} dB") for score in (9, 3, 12, 6)],
    )


def planted(model: BSMamba2, mixture: Tensor) -> dict[str, Tensor]:
    """Estimates (c, samples) of a model for a mixture (c, samples): the correct one, and one for each planted fault."""
    lengths, silu = (model.config.n_fft, model.config.hop_length, model.config.win_length), functional.silu
    X = stft(mixture[None], *lengths)
    M = model.masks(X)
    products = {
        "correct": M * X,
        "mask multiplied part by part": torch.complex(M.real * X.real, M.imag * X.imag),
        "modulus of the mask limited to 1": M / M.abs().clamp(min=1) * X,
    }

    def forgetful(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        parts = zip(*(part.split(64, dim=1) for part in (x, dt, B, C)), strict=True)
        return torch.cat([ssd.chunked(x, dt, A, B, C, D) for x, dt, B, C in parts], dim=1)

    def coarse(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        rounded = ((dt * A).exp().bfloat16().float().log() / A).clamp(min=1e-9)  # the Δ of the rounded decay
        return ssd.chunked(x * (dt / rounded)[..., None], rounded, A, B, C) + D[:, None] * x

    for name, scan in {
        "SiLU applied twice": lambda x, dt, A, B, C, D: ssd.chunked(silu(x), dt, A, silu(B), silu(C), D),
        "state forgotten every 64 frames": forgetful,
        "decay rounded to bfloat16": coarse,
        "frames and bands scrambled": ssd.chunked,
    }.items():
        faulty = copy.deepcopy(model)
        restore(faulty)
        for part in faulty.modules():
            if isinstance(part, Mamba2):
                part.scan = scan
            elif isinstance(part, DualPath) and name == "frames and bands scrambled":  # reshaped, not transposed
                part.time.register_forward_pre_hook(lambda _, x: x[0].transpose(0, 1).reshape(x[0].shape))
                part.time.register_forward_hook(lambda _, x, y: y.reshape(y.transpose(0, 1).shape).transpose(0, 1))
        products[name] = faulty.masks(X) * X
    return {name: istft(product[0], mixture.shape[-1], *lengths)[0] for name, product in products.items()}


@torch.inference_mode()
def faults(model: BSMamba2) -> HTML:
    """Faults of a port, planted in a trained model, to distinguish by ear from a hidden copy of the correct output."""
    song = synthesise(2029, seconds=3.0)
    estimates = planted(model, song.mixture)
    scores = {name: metrics.usdr(song.vocals, estimate) for name, estimate in estimates.items()}
    near = sorted(abs(score - scores["correct"]) for score in scores.values())[-3]  # two are far off
    return blind_test(
        "faults",
        "One of the sounds A to G equals the correct output; each of the others comes from a model with one planted "
        "fault. Which sounds are faulty? Choose before you open the answer.",
        "Two faults are easy to hear: the mask multiplied part by part, and the scrambled frames and bands. The other "
        f"four change the output so little that the uSDR differs by at most {near:.1f} dB. Neither your ears nor the "
        "score will find these four reliably, but a test does. We left out the faults of the port that do not change "
        "the output of a given model, such as those in its training, its scores and its benchmark.",
        {"correct output": estimates["correct"]},
        [
            (estimates[name], "correct" if name == "correct" else "faulty", f"{name}, uSDR {scores[name]:.1f} dB")
            for name in sorted(estimates, key=lambda name: name[::-1])  # an order that does not reveal the answers
        ],
    )
