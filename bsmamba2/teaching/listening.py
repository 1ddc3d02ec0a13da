"""Explorables with audio; see `bsmamba2.teaching.explorables`."""

from __future__ import annotations

import itertools
from typing import Any

from IPython.display import HTML
from torch import Tensor

from .. import metrics
from ..bands import generate_bands, published_bands
from ..model import BSMamba2
from ..synth import Song, excerpt, synthesise
from . import demos, plotting
from .explorables import explorable, numbers

# --- bands ------------------------------------------------------------------------------------------------


def bands() -> HTML:
    """Band tables by the rule of `generate_bands`, above the published one, each with the score of its best gains."""
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
        f"bands it gains another {scores[96] - scores[62]:.1f} dB, and the model would be half as expensive again. "
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

    The estimate is the voice plus a tenth of the accompaniment. The song should be sung throughout: its voice is kept
    in the first `sung` seconds and silenced in the others.
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
    """Leak and occupancy: turn up the leak where nobody sings, and watch which metric moves."""
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
    """Occupancy: the same accompaniment with less and less singing, separated by a model."""
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
        "the separation sounds no worse? Which sound is left in the estimate when nobody sings, and which "
        "instrument does it resemble?",
        "With less singing the uSDR falls, because the same leakage is compared with less energy of the voice. When "
        "nobody sings, the correct output is silence and the uSDR has no meaning; the silence leakage still has one.",
        {"How much is sung": [f"{share:.0%}" for share in shares]},
        [setting(share, run) for share, run in zip(shares, runs, strict=True)],
        labels=labels,
    )
