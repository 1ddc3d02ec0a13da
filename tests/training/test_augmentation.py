"""Data augmentation: each change is what it says, nothing else changes, and drawing them costs no reading."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from bsmamba2.data import find_windows
from bsmamba2.synth import STEMS, Song, synthesise_songs
from bsmamba2.training.augmentation import SEMITONES, Augmentation, AugmentedRemixer
from bsmamba2.training.datasets import FileTrack
from bsmamba2.training.loader import Loader

RATE, SAMPLES = 44_100, 22_050

SEEDS = range(200)


@pytest.fixture(scope="module")
def pool() -> list[Song]:
    return synthesise_songs(3, seed=5, seconds=2.0, sample_rate=8_000)


def noise(seed: int, samples: int = SAMPLES, channels: int = 2) -> Tensor:
    return torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed))


def sine(hertz: float, samples: int) -> Tensor:
    return torch.sin(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / RATE).float().repeat(2, 1)


def strongest(sound: Tensor) -> float:
    """Frequency of the strongest line, in hertz."""
    spectrum = torch.fft.rfft(sound).abs().square().sum(0)
    return float(spectrum.argmax()) * RATE / sound.shape[-1]


def above(sound: Tensor, hertz: float) -> float:
    """Share of the energy above a frequency."""
    power = torch.fft.rfft(sound).abs().square().sum(0)
    return float(power[round(hertz * sound.shape[-1] / RATE) :].sum() / power.sum())


def test_a_stem_is_played_at_the_speed_that_was_drawn() -> None:
    speeds = []
    for seed in SEEDS:
        change = Augmentation(seed, 2)
        pieces = [sine(1_000, length) for length in change.lengths(SAMPLES)]
        out = change(pieces, SAMPLES, RATE)
        for speed, stem in zip(change.speeds, out, strict=True):
            assert stem.shape == (2, SAMPLES)
            # Saturation adds harmonics and roughness side lines, both weaker than the line itself.
            assert strongest(stem) == pytest.approx(1_000 * speed, abs=1.01)
        speeds += change.speeds
    semitones = [12 * math.log2(speed) for speed in speeds]
    assert 0.4 < sum(speed == 1 for speed in speeds) / len(speeds) < 0.6
    assert 0.9 * SEMITONES < max(semitones) <= SEMITONES
    assert 0.9 * SEMITONES < -min(semitones) <= SEMITONES


def test_stems_of_one_place_share_a_speed_and_others_do_not() -> None:
    assert all(len(set(Augmentation(seed, 4, coherent=True).speeds)) == 1 for seed in SEEDS)
    assert sum(len(set(Augmentation(seed, 4).speeds)) > 1 for seed in SEEDS) > 0.85 * len(SEEDS)


def test_a_stem_keeps_its_level_and_a_low_pass_takes_treble_from_all_or_none() -> None:
    cut = 0
    for seed in SEEDS:
        change = Augmentation(seed, 3)
        pieces = [(n + 1) * noise(n, length) for n, length in enumerate(change.lengths(SAMPLES))]
        out = change(pieces, SAMPLES, RATE)
        # A piece that is slowed down has no treble itself, so one at its own speed or faster tells.
        tells = [stem for stem, speed in zip(out, change.speeds, strict=True) if speed >= 1]
        cuts = {above(stem, 20_400) < 1e-9 for stem in tells}
        assert len(cuts) <= 1
        cut += True in cuts
        for piece, stem in zip(pieces, out, strict=True):
            loss = float(stem.square().mean().sqrt() / piece.square().mean().sqrt())
            assert loss <= 1.001
            if cuts == {False}:
                assert loss == pytest.approx(1, abs=1e-3)
    assert 0.3 < cut / len(SEEDS) < 0.5


def test_the_target_alone_becomes_rough() -> None:
    def trembles(sound: Tensor) -> bool:
        envelope = sound.square().sum(0).reshape(-1, 147).mean(1)[3:-3]  # 300 values a second
        return bool(envelope.std() > 0.1 * envelope.mean())

    found = [0, 0]
    for seed in SEEDS:
        change = Augmentation(seed, 2)
        out = change([sine(3_000, length) for length in change.lengths(SAMPLES)], SAMPLES, RATE)
        found = [count + trembles(stem) for count, stem in zip(found, out, strict=True)]
    assert found[1] == 0
    assert 0.2 < found[0] / len(SEEDS) < 0.4


def test_the_target_alone_gets_a_double_that_is_late_by_5_to_25_milliseconds() -> None:
    """What is in the middle stays the same sound on both sides, wherever it is moved, unless a double is added."""
    found, late = [0, 0], []
    for seed in SEEDS:
        change = Augmentation(seed, 2)
        pieces = [noise(n, length, channels=1).repeat(2, 1) for n, length in enumerate(change.lengths(SAMPLES))]
        for number, stem in enumerate(change(pieces, SAMPLES, RATE)):
            if torch.corrcoef(stem)[0, 1] < 0.94:
                found[number] += 1
                middle, side = torch.fft.rfft(torch.stack((stem[0] + stem[1], stem[0] - stem[1])))
                alike = torch.fft.irfft(side * middle.conj(), SAMPLES)[round(0.002 * RATE) :].abs()
                late.append(float(alike.argmax()) / RATE + 0.002)
    assert found[1] == 0
    assert 0.2 < found[0] / len(SEEDS) < 0.4
    assert 0.005 <= min(late) < 0.008
    assert 0.022 < max(late) <= 0.0251


def test_each_kind_of_change_comes_as_often_as_the_docstring_says() -> None:
    """Seen from outside, on the stem that is no target (the other is silent): colour, saturation, exchanged sides."""
    coloured, driven, exchanged = 0, 0, 0
    for seed in SEEDS:
        change = Augmentation(seed, 2)
        length = change.lengths(SAMPLES)[1]

        def changed(piece: Tensor, change: Augmentation = change) -> Tensor:
            return change([torch.zeros_like(piece), piece], SAMPLES, RATE)[1]

        power = torch.fft.rfft(changed(noise(1, length))).abs().square().sum(0)
        octaves = torch.stack([power[2**k : 2 ** (k + 1)].mean().log10() * 10 for k in range(6, 12)])
        coloured += bool(octaves.std() > 0.6)
        lines = torch.fft.rfft(changed(sine(1_000, length))).abs().square().sum(0)
        line = round(1_000 * change.speeds[1] * SAMPLES / RATE)
        driven += bool(lines[3 * line - 9 : 3 * line + 10].max() > 1e-5 * lines[line - 9 : line + 10].max())
        left = noise(2, length) * torch.tensor([[1.0], [0.0]])
        exchanged += bool(changed(left)[1].norm() > changed(left)[0].norm())
    assert coloured / len(SEEDS) == pytest.approx(0.7, abs=0.1)
    assert driven / len(SEEDS) == pytest.approx(0.25, abs=0.08)
    assert exchanged / len(SEEDS) == pytest.approx(0.5, abs=0.1)


def test_a_silent_stem_stays_silent_and_leaves_the_others_as_they_are() -> None:
    for seed in islice(SEEDS, 20):
        change = Augmentation(seed, 3)
        pieces = [noise(n, length) for n, length in enumerate(change.lengths(SAMPLES))]
        whole = change(pieces, SAMPLES, RATE)
        pieces[1] = torch.zeros_like(pieces[1])
        without = change(pieces, SAMPLES, RATE)  # called again, it does the same
        assert not without[1].any()
        assert torch.equal(whole[0], without[0])
        assert torch.equal(whole[2], without[2])


def test_one_channel_has_no_sides() -> None:
    for seed in islice(SEEDS, 20):
        change = Augmentation(seed, 2)
        out = change([noise(n, length, channels=1) for n, length in enumerate(change.lengths(SAMPLES))], SAMPLES, RATE)
        assert [stem.shape for stem in out] == [(1, SAMPLES)] * 2
        assert all(stem.isfinite().all() for stem in out)


def test_as_many_examples_as_asked_are_changed_and_none_by_default(pool: list[Song]) -> None:
    def changed(**share: float) -> float:
        names = [
            name for _, _, found in islice(AugmentedRemixer(pool, 4_000, 4, seed=1, **share), 50) for name in found
        ]
        return sum(name.endswith(", changed") for name in names) / len(names)

    assert changed() == 0
    assert changed(augment_prob=0.3) == pytest.approx(0.3, abs=0.1)
    assert changed(augment_prob=1.0) == 1
    with pytest.raises(ValueError, match=r"augment_prob=-0\.1 must lie in \[0, 1\]"):
        AugmentedRemixer(pool, 4_000, 1, augment_prob=-0.1)


def test_a_supply_without_changes_draws_no_number_for_them(pool: list[Song]) -> None:
    """Or runs from before there were any would go on with other examples."""
    remixer, generator = AugmentedRemixer(pool, 4_000, 1, seed=9), torch.Generator().manual_seed(9)
    for _, _, (name,) in islice(remixer, 6):
        heard = []
        for stem, windows in enumerate(remixer.windows):
            track, start = windows[int(torch.randint(len(windows), (), generator=generator))]
            absent, _ = torch.rand(2, generator=generator)
            if absent >= 0.1:
                heard.append(f"{track.label(stem)} at {start / 8_000:.2f} s")
        assert name == " + ".join(heard)


def test_what_is_not_changed_is_the_example_that_it_was(pool: list[Song]) -> None:
    """By number, an example's places and gains do not depend on the share of changed ones."""
    plain = list(islice(Loader(AugmentedRemixer(pool, 4_000, 1, seed=2)), 40))
    some = list(islice(Loader(AugmentedRemixer(pool, 4_000, 1, seed=2, augment_prob=0.5)), 40))
    kept = 0
    for (mixture, target, names), (other, others, named) in zip(plain, some, strict=True):
        assert named[0].removesuffix(", changed") == names[0]
        if named == names:
            kept += 1
            assert torch.equal(mixture, other)
            assert torch.equal(target, others)
    assert 10 < kept < 30


def test_skipping_changed_examples_draws_the_same_and_reads_nothing(
    pool: list[Song], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remixer() -> AugmentedRemixer:
        return AugmentedRemixer(pool, 4_000, 2, seed=4, augment_prob=0.6, coherent_mix_prob=0.5)

    batches, skipped = list(islice(remixer(), 6)), remixer()

    def read(*_: object) -> Tensor:
        pytest.fail("what is skipped need not be read")

    with monkeypatch.context() as patched:
        patched.setattr(Song, "crop", read)
        skipped.skip(5)
    again = next(iter(skipped))
    assert torch.equal(again[0], batches[5][0])
    assert torch.equal(again[1], batches[5][1])
    assert again[2] == batches[5][2]


def test_a_changed_target_is_what_the_mixture_holds(pool: list[Song]) -> None:
    """Of songs whose band is silent, the mixture is the target, however it is changed."""
    lonely = []
    for song in pool:
        stems = song.stems.clone()
        stems[1:] = 0
        lonely.append(Song(song.name, stems, song.sample_rate, song.vocal_segments, song.licence, song.source))
    windows = AugmentedRemixer(pool, 4_000, 1).windows
    by_name = {song.name: song for song in lonely}
    silent = [[(by_name[track.name], start) for track, start in found] for found in windows]
    for mixture, target, _ in islice(AugmentedRemixer(silent, 4_000, 1, augment_prob=1.0, stem_dropout=0.0), 30):
        torch.testing.assert_close(mixture, target)


@pytest.mark.parametrize("samples", [16_000, 12_000, 4_000])
def test_files_are_read_within_their_ends_and_give_what_memory_gives(
    pool: list[Song], samples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sped up, an example of a song's whole length has too little of it: then all there is is read."""
    tracks = []
    for song in pool:
        paths = tuple(tmp_path / f"{song.name}-{name}.wav" for name in STEMS)
        for path, stem in zip(paths, song.stems, strict=True):
            soundfile.write(path, stem.T.numpy(), song.sample_rate, subtype="FLOAT")
        tracks.append(FileTrack(song.name, paths, song.sample_rate, song.samples))
    read, asked = FileTrack.crop, []

    def within(self: FileTrack, stem: int, start: int, samples: int) -> Tensor:
        assert 0 <= start <= start + samples <= self.samples
        asked.append(samples)
        return read(self, stem, start, samples)

    windows = AugmentedRemixer(pool, samples, 1).windows
    by_name = {track.name: track for track in tracks}
    filed = [[(by_name[track.name], start) for track, start in found] for found in windows]
    monkeypatch.setattr(FileTrack, "crop", within)
    of_files = islice(AugmentedRemixer(filed, samples, 1, augment_prob=1.0, seed=3), 20)
    of_songs = islice(AugmentedRemixer(pool, samples, 1, augment_prob=1.0, seed=3), 20)
    for (mixture, target, _), (other, others, _) in zip(of_files, of_songs, strict=True):
        assert mixture.shape == target.shape == (1, 2, samples)
        assert torch.equal(mixture, other)
        assert torch.equal(target, others)
    assert min(asked) < samples
    assert max(asked) == min(pool[0].samples, max(asked))
    assert (max(asked) > samples) == (samples < pool[0].samples)


def test_changed_examples_do_not_depend_on_workers_or_threads() -> None:
    pool = synthesise_songs(2, seed=6, seconds=1.5)

    def examples(workers: int) -> list[tuple[Tensor, Tensor, list[str]]]:
        return list(islice(Loader(AugmentedRemixer(pool, 44_100, 1, seed=2, augment_prob=1.0), workers=workers), 8))

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        several = examples(0)
        torch.set_num_threads(1)
        one = examples(0)
    finally:
        torch.set_num_threads(threads)
    for found in (one, examples(2)):
        for (mixture, target, names), (other, others, named) in zip(several, found, strict=True):
            assert torch.equal(mixture, other)
            assert torch.equal(target, others)
            assert names == named


def test_as_many_examples_as_asked_are_of_one_song_and_place(pool: list[Song]) -> None:
    def places(original: float) -> list[tuple[list[tuple[str, int]], list[float]]]:
        remixer, generator = (
            AugmentedRemixer(pool, 4000, 1, coherent_mix_prob=original),
            torch.Generator().manual_seed(0),
        )
        drawn = [remixer.draw(generator) for _ in range(400)]
        return [([(track.name, start) for track, start, _ in one], [gain for *_, gain in one]) for one in drawn]

    shares = {share: places(share) for share in (0.0, 0.3, 1.0)}
    together = {share: sum(len(set(where)) == 1 for where, _ in found) / 400 for share, found in shares.items()}
    windows = [len(found) for found in find_windows(pool, 4000)]
    assert min(windows) > 3  # so that stems hardly meet by chance
    assert together[0.0] < 0.05
    assert together[0.3] == pytest.approx(0.3, abs=0.08)
    assert together[1.0] == 1
    vocal_segments = {(track.name, start) for track, start in find_windows(pool, 4000)[0]}
    assert {where[0] for where, _ in shares[1.0]} == vocal_segments
    assert all(len({gain for gain in gains if gain}) == sum(gain > 0 for gain in gains) for _, gains in shares[1.0])
    assert 0.05 < torch.tensor([gains for _, gains in shares[1.0]]).eq(0).float().mean() < 0.15
    with pytest.raises(ValueError, match=r"coherent_mix_prob=1\.5 must lie in \[0, 1\]"):
        AugmentedRemixer(pool, 4000, 1, coherent_mix_prob=1.5)


def test_an_example_of_one_place_is_that_song_with_other_gains(pool: list[Song]) -> None:
    by_name = {song.name: song for song in pool}
    for mixture, target, names in islice(
        AugmentedRemixer(pool, 8000, 1, coherent_mix_prob=1.0, gains=(1.0, 1.0), stem_dropout=0.0), 5
    ):
        name, place = names[0].split(" + ")[0].removesuffix(" s").split(" at ")
        song, start = next(song for key, song in by_name.items() if key in name), round(float(place) * 8000)
        torch.testing.assert_close(mixture[0], song.mixture[:, start : start + 8000], rtol=0, atol=1e-6)
        assert torch.equal(target[0], song.vocals[:, start : start + 8000])


def test_several_targets_are_changed_as_they_are_in_the_mixture(pool: list[Song]) -> None:
    changed = {"augment_prob": 1.0, "coherent_mix_prob": 0.5, "seed": 3}
    halves = [
        islice(AugmentedRemixer(pool, 4_000, 2, targets=targets, **changed), 10) for targets in ((0, 1), (0, 2, 3, 1))
    ]
    for (mixture, some, _), (same, every, _) in zip(*halves, strict=True):
        assert torch.equal(mixture, same)
        assert torch.equal(some[:, 0], every[:, 0])
        assert torch.equal(some[:, 1], every[:, 3])
        torch.testing.assert_close(every.sum(1), mixture)


def test_one_place_is_drawn_for_the_first_target(pool: list[Song]) -> None:
    windows = find_windows(pool, 4_000)
    drums, vocals = ({(track.name, start) for track, start in windows[stem]} for stem in (1, 0))
    remixer = AugmentedRemixer(pool, 4_000, 1, coherent_mix_prob=1.0, targets=(1, 0))
    drawn = {(track.name, start) for _ in range(400) for track, start, _ in remixer.draw(remixer.generator)}
    assert drawn == drums != vocals
    assert remixer.draw_augmentation(remixer.draw(remixer.generator), remixer.generator) is None
    changing = AugmentedRemixer(pool, 4_000, 1, augment_prob=1.0, targets=(1, 0))
    augmentation = changing.draw_augmentation(changing.draw(changing.generator), changing.generator)
    assert augmentation is not None
    assert augmentation.voice == 1
