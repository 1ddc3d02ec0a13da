"""Seeded songs: the same arguments give the same bits.

    seed → score → vocals, drums, bass, other → equaliser, room → (random production) → levels → Song

Every part draws from its own random generator, so that changing an option leaves the other parts unchanged.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .accompaniment import play_accompaniment, play_bass
from .drums import play_drums
from .mix_variety import apply_production
from .mixing import equalise_and_reverberate, set_levels
from .score import draw_phrases, draw_score
from .song import SAMPLE_RATE, Song
from .soundfont import Recorded, SoundFont
from .voice import sing

NO_VOCALS_SHARE, ALWAYS_SUNG_SHARE = 0.1, 0.1
"""Fractions of the songs of `synthesise_songs` that have no vocals and that are sung throughout."""

_open_soundfont = cache(SoundFont)


def synthesise(
    seed: int,
    *,
    seconds: float = 6.0,
    occupancy: float = 0.6,
    mix_variety: float = 0.0,
    sample_rate: int = SAMPLE_RATE,
    soundfont: str | Path = "",
) -> Song:
    """Synthesise a song; the same arguments give the same bits.

    Args:
        seed: seed of all random draws, at least 0.
        seconds: duration, at least 0.5.
        occupancy: fraction of the duration covered by sung phrases, each from its first consonant to the end of its
            last note; 0 means no vocals, 1 singing throughout. Reverberation lasts for up to `mixing.TAIL_SECONDS`
            after a phrase; elsewhere the vocals are exactly zero. Of the accompaniment, it changes only the level.
        mix_variety: 0 for a clean mix with loud vocals, up to 1 for the random production of `mix_variety`.
        sample_rate: in Hz, at least 8000.
        soundfont: path of a General MIDI sound font, whose recorded instruments play most parts of the accompaniment;
            the vocals are always synthesised. The bits then depend on the file and on the version of FluidSynth.

    Raises:
        ValueError: for an argument out of range.
        ImportError, FileNotFoundError: from `soundfont.SoundFont`.
    """
    _check_integers(seed=(seed, 0), sample_rate=(sample_rate, 8_000))
    if not (math.isfinite(seconds) and seconds >= 0.5):
        raise ValueError(f"seconds is {seconds!r}; give a finite duration of at least 0.5")
    _check_shares(occupancy=occupancy, mix_variety=mix_variety)

    rngs = [np.random.default_rng(s) for s in np.random.SeedSequence(int(seed)).spawn(10)]
    score_rng, phrase_rng, vocals_rng, drums_rng, bass_rng, other_rng, mix_rng, *optional_rngs = rngs
    production_rng, recorded_rng, lowpass_rng = optional_rngs
    rate = int(sample_rate)
    samples = round(seconds * rate)
    recorded = Recorded(recorded_rng, _open_soundfont(str(soundfont)), rate) if soundfont else None

    score = draw_score(score_rng, samples / rate)
    phrases = draw_phrases(phrase_rng, occupancy, score)
    dry = {
        "vocals": sing(vocals_rng, score, phrases, rate, samples),
        "drums": play_drums(drums_rng, score, rate, samples, recorded),
        "bass": play_bass(bass_rng, score, rate, samples, recorded),
        "other": play_accompaniment(other_rng, score, rate, samples, recorded),
    }
    stems, levels = equalise_and_reverberate(mix_rng, dry, rate)
    offset = apply_production(production_rng, lowpass_rng, stems, mix_variety, rate) if mix_variety else 0.0
    stems = set_levels(mix_rng, stems, levels, offset, phrases, score, rate)
    licence, arguments = "CC0-1.0", f"{int(seed)}, {seconds=}, {occupancy=}, {mix_variety=}, sample_rate={rate}"
    if soundfont:
        licence += f", but for the recordings of {Path(soundfont).name}"
        arguments += f", soundfont={Path(soundfont).name!r}"
    return Song(f"synthetic-{int(seed)}", torch.from_numpy(stems), rate, phrases, licence, f"synthesise({arguments})")


def synthesise_songs(
    count: int,
    *,
    seed: int = 0,
    seconds: float = 6.0,
    mix_variety: float = 0.0,
    sample_rate: int = SAMPLE_RATE,
    soundfont: str | Path = "",
    soundfont_share: float = 1.0,
    clean_share: float = 0.0,
    first: int = 0,
    every: int = 1,
) -> list[Song]:
    """Synthesise `count` different songs, each with its own occupancy and mix variety.

    One song in ten has no vocals, and one in ten is sung throughout; the others have an occupancy between 0.3 and 0.9.
    Song i depends only on `seed` and i, so a longer list begins with the songs of a shorter one. A song of 6 s takes
    8.5 MB.

    Args:
        count: number of songs, at least 0.
        seed: seed of all songs, at least 0.
        seconds, sample_rate, soundfont: as in `synthesise`.
        mix_variety: upper limit; each song draws a value between 0 and this.
        soundfont_share: fraction of the songs in which the sound font plays.
        clean_share: fraction of the songs with neither mix variety nor sound font.
        first, every: make only songs `first`, `first + every`, … below `count`, so that processes can share the work.

    Raises:
        ValueError: for an argument out of range.
    """
    _check_integers(count=(count, 0), seed=(seed, 0))
    _check_shares(soundfont_share=soundfont_share, clean_share=clean_share)
    songs = []
    for i in range(first, count, every):
        sequence = np.random.SeedSequence([seed, i])
        kind, share, variety, recorded, clean = np.random.default_rng(sequence).random(5).tolist()
        occupancy = round(0.3 + 0.6 * share, 3)
        if kind < NO_VOCALS_SHARE or kind > 1 - ALWAYS_SUNG_SHARE:
            occupancy = float(kind > 0.5)
        is_clean = clean < clean_share
        options: dict[str, Any] = {
            "mix_variety": 0.0 if is_clean else round(variety * mix_variety, 3),
            "soundfont": soundfont if recorded < soundfont_share and not is_clean else "",
        }
        song_seed = int(sequence.generate_state(2)[1])
        songs.append(synthesise(song_seed, seconds=seconds, occupancy=occupancy, sample_rate=sample_rate, **options))
    return songs


def _check_integers(**values: tuple[Any, int]) -> None:
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} is {value!r}; give an integer of at least {least}")


def _check_shares(**shares: float) -> None:
    for name, share in shares.items():
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} is {share!r}; give a number between 0 and 1")
