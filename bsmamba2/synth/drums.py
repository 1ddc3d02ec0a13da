"""Drum kit: one-shots from swept sines and filtered noise, placed on a pattern."""

import numpy as np
from numpy.random import Generator

from .filters import bandpass, pan
from .score import Score
from .song import Array
from .soundfont import Recorded

NO_DRUMS_PROB, CLAP_PROB, SHAKER_PROB, FILL_PROB = 0.06, 0.3, 0.25, 0.2
CRASH_PROB, RECORDED_CRASH_PROB = 0.15, 0.4
"""Probability of a crash per bar, with synthetic and with recorded drums."""
STYLES = {
    "rock": (0.35, {0, 8}), "house": (0.2, {0, 4, 8, 12}), "hip hop": (0.2, {0, 7, 10}), "half time": (0.1, {0, 6}),
    "broken": (0.15, {0, 3, 10}),
}  # fmt: skip
"""Probability of each style, and the sixteenths on which its kick plays."""


def play_drums(rng: Generator, score: Score, rate: int, samples: int, recorded: Recorded | None) -> Array:
    """Play a drum kit on a pattern with variations and fills, (c, t)."""
    out = np.zeros((2, samples), np.float32)
    if rng.random() < NO_DRUMS_PROB:
        return out

    def hit(sound: Array, step: int, velocity: float, position: float) -> None:
        start = max(0, round((score.time(step) + jitter * rng.standard_normal()) * rate))
        length = min(len(sound), samples - start)
        if length > 0:
            out[:, start : start + length] += pan(position) * (np.float32(velocity) * sound[:length])

    jitter = rng.uniform(0, 0.004)
    style = rng.choice(list(STYLES), p=[probability for probability, _ in STYLES.values()])
    kicks, snares = STYLES[style][1], {8} if style == "half time" else {4, 12}
    hat_step = int(rng.choice([1, 2, 2, 2, 4]))
    kick = _kick(rng, rate)
    snare = _clap(rng, rate) if rng.random() < CLAP_PROB else _snare(rng, rate)
    hat_low = rng.uniform(5_500, 8_500)
    closed = _cymbal(rng, rate, rng.uniform(0.02, 0.05), hat_low, rng.choice([0, 0.5]))
    opened = _cymbal(rng, rate, rng.uniform(0.12, 0.3), hat_low, rng.choice([0, 0.5]))
    hat_level, hat_position = 10 ** (rng.uniform(-16, -6) / 20), rng.uniform(-0.5, 0.5)
    shaker = _cymbal(rng, rate, 0.04, rng.uniform(4_000, 6_500), 0) if rng.random() < SHAKER_PROB else None
    offbeat = style == "house" or rng.random() < 0.2
    kit = recorded.kit() if recorded else {}
    if kit:
        kick, snare = kit.get("kick", kick), kit.get("snare", snare)
        closed, opened = kit.get("closed", closed), kit.get("opened", opened)
        shaker = shaker if shaker is None else kit.get("shaker", shaker)
        hat_level *= 10 ** (rng.uniform(0, 9) / 20)
    for bar in range(0, score.steps, 16):
        ghosts = set(rng.choice(16, 2, replace=False).tolist()) if rng.random() < 0.5 else set()
        fill = rng.random() < FILL_PROB
        if fill:
            synthetic_tom = _tom(rng, rate, rng.uniform(80, 200))
            tom = kit.get("tom", synthetic_tom)
        if rng.random() < (RECORDED_CRASH_PROB if kit else CRASH_PROB):
            crash = kit["crash"] if "crash" in kit else _cymbal(rng, rate, rng.uniform(0.4, 0.8), 3_000, 0.4)
            hit(crash, bar, rng.uniform(0.2, 0.4), rng.uniform(-0.6, 0.6))
        for s in range(min(16, score.steps - bar)):
            step = bar + s
            if fill and s >= 12:
                hit(tom if s % 2 else snare, step, rng.uniform(0.5, 0.9), (s - 13.5) / 3)
                continue
            if s in kicks or (s in ghosts and rng.random() < 0.5):
                hit(kick, step, rng.uniform(0.85, 1.0), 0.0)
            if s in snares:
                hit(snare, step, rng.uniform(0.7, 0.95), 0.0)
            elif s in ghosts and rng.random() < 0.3:
                hit(snare, step, rng.uniform(0.1, 0.25), 0.0)
            if offbeat and s % 4 == 2:
                hit(opened, step, hat_level * rng.uniform(0.8, 1), hat_position)
            elif s % hat_step == 0:
                hit(closed, step, hat_level * (1.0 if s % 4 == 0 else rng.uniform(0.5, 0.9)), hat_position)
            if shaker is not None:
                hit(shaker, step, 0.15 * rng.uniform(0.4, 1), -hat_position)
    return out


def _kick(rng: Generator, rate: int) -> Array:
    t = np.arange(int(0.45 * rate)) / rate
    low, sweep, speed = rng.uniform(42, 62), rng.uniform(80, 350), rng.uniform(0.008, 0.04)
    tone = np.sin(2 * np.pi * (low * t - sweep * speed * np.exp(-t / speed))) * np.exp(-t / rng.uniform(0.07, 0.22))
    click = bandpass(rng.standard_normal(len(t), dtype=np.float32), 1_500, 7_000, rate) * np.exp(-t / 0.004)
    return np.tanh(rng.uniform(1, 2.5) * (tone + rng.uniform(0.1, 0.8) * click)).astype(np.float32)


def _snare(rng: Generator, rate: int) -> Array:
    t = np.arange(int(0.4 * rate)) / rate
    phase = 2 * np.pi * rng.uniform(150, 260) * t
    tone = (np.sin(phase + 2 * np.exp(-t / 0.02)) + 0.6 * np.sin(1.6 * phase)) * np.exp(-t / rng.uniform(0.03, 0.1))
    noise = rng.standard_normal(len(t), dtype=np.float32)
    rattle = bandpass(noise, rng.uniform(700, 2_500), rng.uniform(7_000, 15_000), rate)
    rattle = rattle * np.exp(-t / rng.uniform(0.05, 0.16))
    return (rng.uniform(0.3, 1) * tone + rng.uniform(0.6, 1.2) * rattle).astype(np.float32)


def _clap(rng: Generator, rate: int) -> Array:
    t = np.arange(int(0.3 * rate)) / rate
    envelope = np.exp(-t / rng.uniform(0.05, 0.12)) * 0.7
    for delay in np.cumsum(rng.uniform(0.006, 0.014, 3)):
        envelope += np.where(t >= delay, np.exp(-np.maximum(t - delay, 0) / 0.006), 0)
    noise = rng.standard_normal(len(t), dtype=np.float32)
    return (bandpass(noise, rng.uniform(700, 1_200), rng.uniform(2_500, 9_000), rate) * envelope).astype(np.float32)


def _cymbal(rng: Generator, rate: int, decay: float, low: float, metal: float) -> Array:
    """Hi-hat, shaker or crash: noise, and square waves at the level `metal`, above `low` Hz."""
    t = np.arange(int(min(5 * decay + 0.02, 1.6) * rate)) / rate
    sound = rng.standard_normal(len(t), dtype=np.float32)
    if metal:
        base = rng.uniform(300, 560)
        squares = sum(np.sign(((base * ratio * t) % 1.0) - 0.5) for ratio in (1.0, 1.34, 1.93, 2.32, 2.62, 3.81))
        sound = (sound + metal * np.asarray(squares, np.float32)).astype(np.float32)
    envelope = np.exp(-t / decay) * np.minimum(t / 0.001, 1)
    return (bandpass(sound, low, rng.uniform(9_000, 15_000), rate) * envelope).astype(np.float32)


def _tom(rng: Generator, rate: int, hertz: float) -> Array:
    t = np.arange(int(0.4 * rate)) / rate
    return (np.sin(2 * np.pi * hertz * (t - 0.02 * np.exp(-t / 0.04))) * np.exp(-t / 0.13)).astype(np.float32)
