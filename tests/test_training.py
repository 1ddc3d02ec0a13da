"""Loss, metrics, examples and the loop: what a training run stands on."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bsmamba2 import BSMamba2, data
from bsmamba2.data import Batch, Loader, Remixer, Validation, find_windows, salient_windows
from bsmamba2.evaluation.evaluate import oracle, score
from bsmamba2.losses import WINDOWS, bsmamba2_loss, snr_loss, spectral_loss
from bsmamba2.metrics import csdr, usdr
from bsmamba2.separate import separate
from bsmamba2.synth.songs import Song, songs
from bsmamba2.train import TrainConfig, Trainer, learning_rate, optimisers, parameter_groups


@pytest.fixture(scope="module")
def pool() -> list[Song]:
    return songs(3, seed=5, seconds=2.0, sample_rate=8000)


# --- loss -------------------------------------------------------------------------------------------------


def test_loss_is_the_published_one(published: dict[str, Tensor]) -> None:
    estimate, target = published["loss.prediction"], published["loss.target"]
    terms = torch.stack([spectral_loss(estimate - target, window) for window in WINDOWS])
    torch.testing.assert_close(terms, published["loss.spectral_by_window"], rtol=1e-5, atol=0)
    torch.testing.assert_close(10 * (estimate - target).abs().mean(), published["loss.time"], rtol=1e-5, atol=0)
    torch.testing.assert_close(bsmamba2_loss(estimate, target), published["loss.total"], rtol=1e-5, atol=0)


def test_loss_hears_phase_and_is_float32() -> None:
    s = torch.randn(2, 8000)
    assert bsmamba2_loss(-s, s) > 1.9 * bsmamba2_loss(torch.zeros_like(s), s)  # loudness alone would say 0
    assert bsmamba2_loss(s.bfloat16(), s.bfloat16()).dtype == torch.float32
    assert bsmamba2_loss(s, s) == 0
    with pytest.raises(ValueError, match="one shape"):
        bsmamba2_loss(s, s[:1])
    with pytest.raises(ValueError, match="2048 samples are too few"):
        bsmamba2_loss(s[:, :2048], s[:, :2048])


def test_loss_gradient_is_finite_where_the_estimate_is_perfect() -> None:
    s = torch.zeros(1, 5000, requires_grad=True)
    bsmamba2_loss(s, torch.zeros(1, 5000)).backward()
    assert s.grad is not None
    assert s.grad.isfinite().all()


def test_snr_loss_is_the_error_below_the_mixture_song_by_song() -> None:
    target, band = torch.randn(3, 2, 5000), torch.randn(3, 2, 5000)
    target[1] *= 0.01  # a quiet example counts as much as a loud one
    band[1] *= 0.01
    estimate, mixture = target + torch.tensor([0.5, 0.1, 0.02])[:, None, None] * band, target + band
    error = np.square((estimate - target).double().numpy()).sum((1, 2))
    whole = np.square(mixture.double().numpy()).sum((1, 2))
    wanted = np.mean(10 * np.log10((error + 1e-7) / (whole + 1e-7)))
    assert snr_loss(estimate, target, mixture, most=200).item() == pytest.approx(wanted, abs=1e-4)
    with_threshold = np.mean(10 * np.log10((error + 1e-3 * whole + 1e-7) / (whole + 1e-7)))
    assert snr_loss(estimate, target, mixture).item() == pytest.approx(with_threshold, abs=1e-4)
    # From one estimate to another it changes as the mean of the scores does.
    gain = snr_loss(mixture, target, mixture, most=200) - snr_loss(estimate, target, mixture, most=200)
    gains = [usdr(s, ours) - usdr(s, x) for s, ours, x in zip(target, estimate, mixture, strict=True)]
    assert gain.item() == pytest.approx(np.mean(gains), abs=1e-3)
    assert snr_loss(target, target, mixture).item() == pytest.approx(-30, abs=0.01)
    assert snr_loss(estimate.bfloat16(), target, mixture).dtype == torch.float32


def test_snr_loss_has_a_gradient_in_silence() -> None:
    mixture = torch.randn(1, 2, 5000)
    for x, estimate in ((mixture, torch.zeros_like(mixture)), (mixture, 0.1 * mixture), (0 * mixture, 0 * mixture)):
        estimate.requires_grad_()
        snr_loss(estimate, torch.zeros_like(x), x).backward()
        assert estimate.grad is not None
        assert estimate.grad.isfinite().all()
        assert bool(estimate.grad.any()) == bool(estimate.detach().any())  # silence is the answer there
    one, two = torch.zeros(1, 2, 4), torch.zeros(2, 2, 4)
    for signals, told in (
        ((two, one, one), "one shape"),
        ((one, one, two), "one shape"),
        ((one[0],) * 3, r"\(b, c, s"),
    ):
        with pytest.raises(ValueError, match=told):
            snr_loss(*signals)


@pytest.mark.parametrize(("vocal_segments", "likelier"), [(7, 1.0), (3, 0.0)])
def test_one_loss_takes_the_likelier_of_two_answers_and_the_other_their_mean(
    vocal_segments: int, likelier: float
) -> None:
    """In some of ten stretches there is a voice, in the others a band that sounds the same, and nothing tells which."""
    mixture = torch.randn(1, 2, 10, 8192)
    target = mixture.clone()
    target[:, :, vocal_segments:] = 0
    mixture, target = mixture.flatten(2), target.flatten(2)
    gains = torch.linspace(0, 1, 11)
    costs = torch.tensor(
        [(bsmamba2_loss(g * mixture, target, hop_length=441), snr_loss(g * mixture, target, mixture)) for g in gains]
    )
    best = gains[costs.argmin(0)]
    assert best[0].item() == pytest.approx(likelier)
    assert best[1].item() == pytest.approx(vocal_segments / 10)


def test_a_trainer_may_take_the_other_loss(tiny: BSMamba2) -> None:
    mixture, target, *_ = next(iter(clips(1)))
    wanted = snr_loss(tiny(mixture)[:, 0], target, mixture).item()
    (step,) = Trainer(tiny, TrainConfig(steps=1, loss="snr")).run([(mixture, target)])
    assert step.loss == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ValueError, match="loss='l1' must be published or snr"):
        TrainConfig(steps=1, loss="l1")


@pytest.mark.parametrize("window", [4096, 512])
@pytest.mark.parametrize("hop_length", [147, 441])
@pytest.mark.parametrize("samples", [2049, 4410, 5003])
def test_spectral_loss_and_gradient_are_those_of_torchs_stft(samples: int, hop_length: int, window: int) -> None:
    signal = torch.randn(3, samples, dtype=torch.float64, requires_grad=True)
    n_fft = max(window, 2048)
    hann = torch.hann_window(window, dtype=torch.float64)
    wanted = torch.stft(signal, n_fft, hop_length, window, hann, pad_mode="reflect", return_complex=True).abs().mean()
    loss = spectral_loss(signal, window, hop_length)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(3 * one, signal)[0] for one in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * theirs.abs().max())


# --- metrics ----------------------------------------------------------------------------------------------


def test_usdr_of_signals_whose_value_is_known() -> None:
    s = torch.randn(2, 44_100)
    assert usdr(s, torch.zeros_like(s)) == pytest.approx(0)
    assert usdr(s, 0.9 * s) == pytest.approx(20, abs=1e-3)
    assert usdr(s, -s) == pytest.approx(-20 * math.log10(2), abs=1e-3)
    assert usdr(0 * s, 0 * s) == pytest.approx(0)
    assert usdr(0 * s, s) < -100


def test_csdr_drops_silent_seconds_and_the_tail() -> None:
    s = torch.randn(2, 44_100 * 5 + 20_000)
    estimate = s * torch.tensor([0.9, 0.5, 0.9, 0.5, 0.9]).repeat_interleave(44_100).tolist()[0]
    assert csdr(s, estimate) == pytest.approx(20, abs=1e-3)
    gains = torch.ones(s.shape[1])
    for second, gain in enumerate((0.9, 0.99, 0.5, 0.9, 0.9)):
        gains[second * 44_100 : (second + 1) * 44_100] = gain
    assert csdr(s, s * gains) == pytest.approx(20, abs=1e-3)  # the median of 20, 40, 6, 20, 20
    silent = s.clone()
    silent[:, 44_100 : 3 * 44_100] = 0
    leak = silent + 10 * (silent == 0)
    leak[:, :44_100] *= 0.9
    leak[:, 3 * 44_100 :] *= 0.9
    assert csdr(silent, leak) == pytest.approx(20, abs=1e-3)
    assert csdr(s, s) == math.inf
    assert math.isnan(csdr(0 * s, s))
    opposite = torch.stack([s[0], -s[0]])  # channels that sum to zero count as silence
    assert math.isnan(csdr(opposite, s))


def test_metrics_refuse_other_shapes() -> None:
    with pytest.raises(ValueError, match=re.escape("(2, 5)")):
        usdr(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="not empty"):
        csdr(torch.zeros(2, 0), torch.zeros(2, 0))


def test_oracle_beats_every_constant_and_silence_stays_silent(pool: list[Song]) -> None:
    song = next(song for song in pool if song.occupancy > 0.2)
    best = usdr(song.vocals, oracle(song, 256, 64))
    assert best > max(usdr(song.vocals, gain * song.mixture) for gain in (0, 0.25, 0.5, 1))
    mute = dataclasses.replace(song, stems=song.stems * torch.tensor([0.0, 1, 1, 1])[:, None, None])
    assert not oracle(mute, 256, 64).any()


# --- examples ---------------------------------------------------------------------------------------------


def test_salient_windows_by_hand() -> None:
    stem = torch.zeros(2, 1000)
    stem[:, 400:700] = torch.randn(2, 300)
    assert salient_windows(stem, 200) == [400, 500]  # of 0, 100, …, 800: more than half of the chunks sound
    assert salient_windows(stem * 1e-5, 200) == []
    stem[1] = 0  # one channel only
    assert salient_windows(stem, 200) == []
    assert salient_windows(torch.randn(2, 150), 200) == []
    with pytest.raises(ValueError, match="5 samples"):
        salient_windows(stem, 5)


def test_half_of_the_chunks_is_not_enough() -> None:
    for loud, expected in ((5, []), (6, [0])):
        stem = torch.zeros(1, 100)
        stem[:, : loud * 10] = 0.5
        assert salient_windows(stem, 100, quantile=0.0) == expected


def test_batches_repeat_with_their_seed(pool: list[Song]) -> None:
    def draw(seed: int) -> list[Batch]:
        return list(islice(Remixer(pool, 8000, 2, seed=seed), 3))

    for one, two in zip(draw(1), draw(1), strict=True):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    assert not torch.equal(draw(1)[0][0], draw(2)[0][0])


def test_the_target_stands_in_the_mixture_with_its_gain(pool: list[Song]) -> None:
    lonely = [dataclasses.replace(song, stems=song.stems[:1]) for song in pool]
    for mixture, target, _ in islice(Remixer(lonely, 8000, 4), 5):
        assert torch.equal(mixture, target)


def test_stems_are_absent_as_often_as_asked_and_gains_are_independent() -> None:
    stems = torch.randn(4, 2, 1000, generator=torch.Generator().manual_seed(0))
    one = Song("noise", stems, 8000, (), "", "")  # as long as a window, so that only the gains are left to draw
    gains = []
    for mixture, target, _ in islice(Remixer([one], 1000, 8, silence=0.1), 250):
        found = torch.linalg.lstsq(stems.flatten(1).T, mixture.flatten(1).T).solution.T  # (8, stem)
        torch.testing.assert_close(found[:, 0, None, None] * stems[0], target, rtol=0, atol=1e-4)
        gains.append(found)
    drawn = torch.cat(gains)
    sounding = drawn.abs() > 1e-3
    for stem in range(4):
        assert sounding[:, stem].float().mean().item() == pytest.approx(0.9, abs=0.03)
        assert 0.499 < drawn[sounding[:, stem], stem].min() < 0.51
        assert 1.49 < drawn[:, stem].max() < 1.501
    assert (torch.corrcoef(drawn.T) - torch.eye(4)).abs().max() < 0.1


def test_as_many_examples_as_asked_are_of_one_song_and_place(pool: list[Song]) -> None:
    def places(original: float) -> list[tuple[list[tuple[str, int]], list[float]]]:
        remixer, generator = Remixer(pool, 4000, 1, original=original), torch.Generator().manual_seed(0)
        drawn = [remixer.draw(generator)[0] for _ in range(400)]
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
    with pytest.raises(ValueError, match=r"original=1\.5 must lie in \[0, 1\]"):
        Remixer(pool, 4000, 1, original=1.5)


def test_an_example_of_one_place_is_that_song_with_other_gains(pool: list[Song]) -> None:
    by_name = {song.name: song for song in pool}
    for mixture, target, names in islice(Remixer(pool, 8000, 1, original=1.0, gains=(1.0, 1.0), silence=0.0), 5):
        name, place = names[0].split(" + ")[0].removesuffix(" s").split(" at ")
        song, start = next(song for key, song in by_name.items() if key in name), round(float(place) * 8000)
        torch.testing.assert_close(mixture[0], song.mixture[:, start : start + 8000], rtol=0, atol=1e-6)
        assert torch.equal(target[0], song.vocals[:, start : start + 8000])


def equal(one: Any, two: Any) -> bool:
    return torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]


def test_examples_say_where_they_are_from_and_skipping_draws_the_same(pool: list[Song]) -> None:
    batches = list(islice(Remixer(pool, 8000, 2, seed=4), 6))
    skipped = Remixer(pool, 8000, 2, seed=4)
    skipped.skip(5)
    assert equal(next(iter(skipped)), batches[5])
    by_label = {song.label(stem): (song, stem) for song in pool for stem in range(4)}
    checked = 0
    for _, targets, names in batches:
        for target, name in zip(targets, names, strict=True):
            label, _, place = name.split(" + ")[0].partition(" at ")
            song, stem = by_label[label]
            if stem == 0:
                start = round(float(place.removesuffix(" s")) * 8000)
                source = song.stems[0, :, start : start + 8000]
                gain = (target * source).sum() / source.square().sum()
                torch.testing.assert_close(target, source * gain)
                checked += 1
    assert checked > 6


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")  # of Python 3.12 on; the workers are torch's own
def test_the_batches_of_a_loader_do_not_depend_on_its_workers(pool: list[Song]) -> None:
    before = torch.get_rng_state()
    plain = list(islice(Loader(Remixer(pool, 8000, 2, seed=4)), 6))
    working = list(islice(Loader(Remixer(pool, 8000, 2, seed=4), workers=2), 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(equal, plain, working))
    assert not any(equal(one, two) for one, two in pairwise(plain))
    later = Loader(Remixer(pool, 8000, 2, seed=4))
    later.skip(4)
    assert equal(next(iter(later)), plain[4])
    other = Loader(Remixer(pool, 8000, 2, seed=5))
    assert not equal(next(iter(other)), plain[0])


def test_processes_share_the_examples_of_one_large_batch(pool: list[Song], monkeypatch: pytest.MonkeyPatch) -> None:
    large = list(islice(Loader(Remixer(pool, 8000, 4, seed=4)), 3))
    monkeypatch.setattr(data, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        shares.append(list(islice(Loader(Remixer(pool, 8000, 2, seed=4)), 3)))
    for whole, first, second in zip(large, *shares, strict=True):
        joined = torch.cat((first[0], second[0])), torch.cat((first[1], second[1])), first[2] + second[2]
        assert equal(whole, joined)


def test_validation_is_the_mean_over_windows_where_the_target_is_heard(tiny: BSMamba2, pool: list[Song]) -> None:
    windows = find_windows(pool, 8000)[0]
    expected = []
    for song, start in windows:
        with torch.inference_mode():
            estimate = tiny(song.mixture[None, :, start : start + 8000])[0, 0]
        expected.append(usdr(song.vocals[:, start : start + 8000], estimate))
    assert Validation(windows, 8000)(tiny) == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    few = Validation(windows, 8000, count=2).windows
    assert few == [windows[0], windows[len(windows) // 2]]
    with pytest.raises(ValueError, match="no song for validation"):
        Validation([], 8000)


def test_a_stem_that_is_never_heard_is_named(pool: list[Song]) -> None:
    mute = [dataclasses.replace(song, stems=song.stems * torch.tensor([1.0, 1, 0, 1])[:, None, None]) for song in pool]
    with pytest.raises(ValueError, match="stem 2 is never heard"):
        Remixer(mute, 8000, 1)
    with pytest.raises(ValueError, match="no song"):
        Remixer([], 8000, 1)


# --- loop -------------------------------------------------------------------------------------------------


def noise(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    while True:
        target = torch.randn(2, 2, 3000, generator=g)
        yield target + torch.randn(2, 2, 3000, generator=g), target


def test_one_example_is_learned_by_heart(tiny: BSMamba2) -> None:
    g = torch.Generator().manual_seed(0)
    wave = torch.sin(torch.arange(3000) / 8000 * 2 * math.pi * 440).expand(1, 2, -1)
    pair = (wave + 0.5 * torch.randn(1, 2, 3000, generator=g), wave)
    steps = list(Trainer(tiny, TrainConfig(steps=60, lr=1e-2, schedule="cosine")).run([pair] * 60))
    assert [step.number for step in steps] == list(range(1, 61))
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_a_run_repeats_bit_for_bit() -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(0)
        trainer = Trainer(BSMamba2(TINY), TrainConfig(steps=3))
        list(trainer.run(noise()))
        return [*trainer.model.parameters(), *trainer.averaged.parameters()]

    assert all(torch.equal(one, two) for one, two in zip(weights(), weights(), strict=True))


def test_the_average_is_the_moving_average(tiny: BSMamba2) -> None:
    trainer = Trainer(tiny, TrainConfig(steps=4, ema_decay=0.5))
    seen, average = [], None
    for _ in trainer.run(noise()):
        seen.append(tiny.final_norm.gain.detach().clone())
        average = seen[-1] if average is None else 0.5 * average + 0.5 * seen[-1]
    torch.testing.assert_close(trainer.averaged.final_norm.gain.detach(), average)
    assert not torch.equal(average, seen[-1])


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny: BSMamba2) -> None:
    before = [p.detach().clone() for p in tiny.parameters()]
    bad = [(torch.full((1, 2, 3000), math.nan), torch.zeros(1, 2, 3000))]
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        list(Trainer(tiny, TrainConfig(steps=1)).run(bad))
    assert all(torch.equal(one, two) for one, two in zip(before, tiny.parameters(), strict=True))


def test_batches_that_run_out_are_an_error(tiny: BSMamba2) -> None:
    with pytest.raises(ValueError, match="after 2 of 5"):
        list(Trainer(tiny, TrainConfig(steps=5)).run(islice(noise(), 2)))


def clips(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(mixture[:1], target[:1]) for mixture, target in islice(noise(), count)]


def gradients(batches: list[tuple[Tensor, Tensor]], **options: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = BSMamba2(TINY)
    Trainer(model, TrainConfig(steps=1, grad_accum_steps=len(batches), **options)).backward(batches)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_accumulated_batches_give_the_gradient_of_the_large_one() -> None:
    four = clips(4)
    large = tuple(torch.cat(parts) for parts in zip(*four, strict=True))
    one, two = gradients(four), gradients([large])
    assert len(one) == len(list(BSMamba2(TINY).parameters()))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6, msg=name)
    different = gradients(four[:2])
    assert any(not torch.allclose(one[name], different[name], rtol=1e-2) for name in one)


def test_a_step_takes_as_many_batches_as_it_accumulates(tiny: BSMamba2) -> None:
    taken = []
    batches = (taken.append(number) or pair for number, pair in enumerate(noise()))
    for step in Trainer(tiny, TrainConfig(steps=2, grad_accum_steps=3)).run(batches):
        assert len(taken) == 3 * step.number
    with pytest.raises(ValueError, match="after 1 of 5"):
        list(Trainer(tiny, TrainConfig(steps=5, grad_accum_steps=3)).run(islice(noise(), 5)))


def test_recomputed_layers_give_the_same_gradient_and_are_computed_again() -> None:
    plain, again = gradients(clips(1)), gradients(clips(1), gradient_checkpointing=True)
    for name in plain:
        torch.testing.assert_close(plain[name], again[name], rtol=1e-5, atol=1e-7, msg=name)
    calls = []
    model = BSMamba2(TINY)
    trainer = Trainer(model, TrainConfig(steps=1, gradient_checkpointing=True))
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.backward(clips(1))
    assert len(calls) == 2
    with torch.no_grad():
        model(clips(1)[0][0])
    assert len(calls) == 3


class Products(TorchDispatchMode):
    """Notes the types that matrix products are given, forwards and backwards, and those of transforms.

    One product is a sum in disguise: the scan's backward pass adds up decays with a triangle of ones, in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "mm" and torch.equal(args[1], torch.ones_like(args[1]).triu(1)):
            self.seen.setdefault("sums", set()).update(a.dtype for a in args)  # of decays, as a product with ones
        elif name in ("mm", "bmm", "addmm", "baddbmm", "mv", "convolution"):
            self.seen.setdefault("products", set()).update(a.dtype for a in args[:3] if isinstance(a, Tensor))
        elif "fft" in name:
            self.seen.setdefault("transforms", set()).update(a.dtype for a in args[:1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)], ids=["bfloat16", "float32"]
)
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["stored", "recomputed"])
def test_every_matrix_product_has_the_precision_asked_for(
    tiny: BSMamba2, precision: str, dtype: torch.dtype, gradient_checkpointing: bool
) -> None:
    trainer = Trainer(tiny, TrainConfig(steps=1, precision=precision, gradient_checkpointing=gradient_checkpointing))
    with Products() as products:
        trainer.backward(clips(1))
    assert products.seen["products"] == {dtype}
    assert products.seen.get("sums", {torch.float32}) == {torch.float32}
    assert products.seen["transforms"] <= {torch.float32, torch.complex64}  # the STFT of the model and of the loss
    assert {p.dtype for p in tiny.parameters()} == {p.grad.dtype for p in tiny.parameters()} == {torch.float32}
    assert trainer.separate(clips(1)[0][0]).dtype == torch.float32


def test_bfloat16_is_near_float32_and_not_equal() -> None:
    one, two = gradients(clips(1)), gradients(clips(1), precision="bfloat16")
    norm = math.sqrt(sum(float(one[name].square().sum()) for name in one))
    apart = math.sqrt(sum(float((one[name] - two[name]).square().sum()) for name in one)) / norm
    assert 1e-5 < apart < 0.1


def test_where_compiling_fails_one_warning_is_given_and_training_goes_on(
    tiny: BSMamba2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        def fail(*_: Any) -> Any:
            raise RuntimeError("no C++ compiler here\nand a long trace")

        return fail

    plain = copy.deepcopy(tiny)
    monkeypatch.setattr(torch, "compile", no_compiler)
    trainer = Trainer(tiny, TrainConfig(steps=2))
    trainer.untried = True  # as with `compile` on a GPU
    with pytest.warns(UserWarning, match=r"without it \(RuntimeError: no C\+\+ compiler here\)") as warned:
        steps = list(trainer.run(clips(2)))
    assert len(warned) == 1
    assert steps == list(Trainer(plain, TrainConfig(steps=2)).run(clips(2)))


def test_decays_and_skips_are_exempt_from_weight_decay(tiny: BSMamba2) -> None:
    decayed, exempt = parameter_groups(tiny, 0.01)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    assert len(exempt["params"]) == 3 * 4  # A_log, D, dt_bias of four mixers
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(tiny.parameters()))


def test_muon_takes_the_weights_of_linears_and_adamw_all_else(tiny: BSMamba2) -> None:
    adamw, muon = optimisers(tiny, TrainConfig(steps=1, optimiser="muon"))
    names = {id(parameter): name for name, parameter in tiny.named_parameters()}
    taken = [
        [names[id(one)] for group in optimiser.param_groups for one in group["params"]] for optimiser in (adamw, muon)
    ]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())  # each once
    linears = {f"{name}.weight" for name, module in tiny.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(taken[1]) == linears
    assert any("in_proj" in name for name in linears)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.01, 0.0]
    assert {name.split(".")[-1] for name in taken[0]} >= {"A_log", "D", "dt_bias", "bias"}


def test_a_step_of_muon_turns_a_matrix_and_its_size_is_that_of_adamw(tiny: BSMamba2) -> None:
    """From rest the step is the gradient with all its singular values made one, whatever the gradient's size."""
    before = copy.deepcopy(tiny.state_dict())
    trainer = Trainer(tiny, TrainConfig(steps=1, optimiser="muon", lr=1e-2, weight_decay=0.0))
    next(iter(trainer.run(clips(1))))
    for name in ("layers.0.time.forwards.mixer.in_proj.weight", "layers.0.band.merge.weight"):
        step = (tiny.state_dict()[name] - before[name]) / 1e-2
        values = torch.linalg.svdvals(step / (0.2 * math.sqrt(max(step.shape))))
        assert values.min() > 0.5, name  # five iterations of Newton and Schulz bring them into this range
        assert values.max() < 1.3, name
        assert step.square().mean().sqrt() == pytest.approx(0.2, rel=0.3), name
    step = (tiny.state_dict()["layers.0.time.forwards.mixer.D"] - before["layers.0.time.forwards.mixer.D"]) / 1e-2
    torch.testing.assert_close(step.abs(), torch.ones_like(step), rtol=1e-3, atol=0)  # AdamW's first step


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_trainer_goes_on_from_its_state_with_the_same_bits(tiny: BSMamba2, optimiser: str) -> None:
    config = TrainConfig(steps=5, optimiser=optimiser, lr=1e-2, schedule="wsd")
    whole, half = (Trainer(copy.deepcopy(tiny), config) for _ in range(2))
    losses = [step.loss for step in whole.run(clips(5))]
    stopped = [step.loss for step in islice(half.run(clips(5)), 2)]
    buffer = io.BytesIO()
    torch.save(half.state(), buffer)
    buffer.seek(0)
    resumed = Trainer(copy.deepcopy(tiny), config)
    resumed.load_state(torch.load(buffer, weights_only=True))
    assert stopped + [step.loss for step in resumed.run(clips(5))] == losses
    for name, part in whole.model.state_dict().items():
        assert torch.equal(part, resumed.model.state_dict()[name]), name


def test_states_from_before_there_was_a_choice_of_optimisers_and_losses_are_taken_up(tiny: BSMamba2) -> None:
    config = TrainConfig(steps=4)
    trainer = Trainer(copy.deepcopy(tiny), config)
    list(islice(trainer.run(clips(4)), 2))
    state = copy.deepcopy(trainer.state())
    (state["optimiser"],) = state.pop("optimisers")
    fields = dataclasses.asdict(config)
    state["train_config"] = json.dumps(
        {k: v for k, v in fields.items() if k not in ("optimiser", "loss", "decay_ratio")}
    )
    old = Trainer(copy.deepcopy(tiny), config)
    old.load_state(state)
    assert list(old.run(clips(4))) == list(trainer.run(clips(4)))
    with pytest.raises(ValueError, match="started with optimiser='adamw', now 'muon'"):
        Trainer(copy.deepcopy(tiny), TrainConfig(steps=4, optimiser="muon")).load_state(state)
    with pytest.raises(ValueError, match="started with loss='published', now 'snr'"):
        Trainer(copy.deepcopy(tiny), TrainConfig(steps=4, loss="snr")).load_state(state)


def test_an_optimiser_that_is_not_there_is_told() -> None:
    with pytest.raises(ValueError, match="optimiser='sgd' must be adamw or muon"):
        TrainConfig(steps=1, optimiser="sgd")


def test_schedule() -> None:
    config = TrainConfig(steps=100, lr=1.0, schedule="cosine")
    rates = [learning_rate(number, config) for number in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(one > two for one, two in pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(50, TrainConfig(steps=100, lr=0.5)) == 0.5


def test_a_trapezoid_may_go_on() -> None:
    config = TrainConfig(steps=1000, lr=1.0, schedule="wsd")
    rates = [learning_rate(number, config) for number in range(1, 1001)]
    assert rates[:100] == pytest.approx([number / 100 for number in range(1, 101)])
    assert set(rates[100:801]) == {1.0}
    assert rates[800:] == pytest.approx([number / 200 for number in range(200, 0, -1)])
    longer = dataclasses.replace(config, steps=2000)
    assert {learning_rate(number, longer) for number in range(100, 1601)} == {1.0}  # more steps: the fall comes later
    slower = dataclasses.replace(config, decay_ratio=0.42)
    rates = [learning_rate(number, slower) for number in range(1, 1001)]
    assert set(rates[100:581]) == {1.0}
    assert rates[580:] == pytest.approx([number / 420 for number in range(420, 0, -1)])


def test_a_cooldown_of_a_fifth_is_what_runs_had_before_it_had_a_name() -> None:
    for steps in range(1, 2_000):
        config = TrainConfig(steps=steps, lr=1.0, schedule="wsd")
        number = steps - steps // 7
        before = min(1.0, number / 100, (steps + 1 - number) / max(1, steps // 5))
        assert learning_rate(number, config) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"lr": "1e-3"}, "lr='1e-3'"),
        ({"lr": math.nan}, "lr=nan"),
        ({"schedule": "linear"}, "schedule='linear'"),
        ({"decay_ratio": 0.0}, "decay_ratio=0.0 must lie in (0, 1]"),
        ({"decay_ratio": True}, "decay_ratio=True"),
        ({"decay_ratio": 1.1}, "decay_ratio=1.1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"grad_accum_steps": 0}, "grad_accum_steps=0"),
        ({"precision": "float16"}, "precision='float16'"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing=1"),
        ({"max_grad_norm": True}, "max_grad_norm=True"),
        ({"loss_windows": ()}, "loss_windows=()"),
        ({"loss_windows": 2048}, "loss_windows=2048"),
    ],
)
def test_a_bad_setting_is_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainConfig(**{"steps": 1, **changes})


def test_several_stems_are_refused() -> None:
    with pytest.raises(ValueError, match="one stem"):
        Trainer(BSMamba2(dataclasses.replace(TINY, stems=("a", "b"))), TrainConfig(steps=1))


def test_scores_stand_beside_their_baselines(tiny: BSMamba2, pool: list[Song]) -> None:
    song = next(song for song in pool if song.occupancy > 0.2)
    found = score(tiny, song, segment=1.0)
    assert found.silence == pytest.approx(0)
    assert found.mixture == usdr(song.vocals, song.mixture)
    assert found.oracle > max(found.mixture, 0)
    quiet = song.stems.clone()
    quiet[0, :, : song.samples // 2] = 0
    estimate = separate(tiny, quiet.sum(0), segment=1.0)[0][:, : song.samples // 2]
    wanted = 10 * torch.log10(estimate.square().sum() / quiet.sum(0)[:, : song.samples // 2].square().sum())
    leak = score(tiny, dataclasses.replace(song, stems=quiet), segment=1.0).leak
    assert leak == pytest.approx(wanted.item(), abs=0.5)  # silence has a margin, and the voice may have more of it
    loud = quiet.clone()
    loud[0] += 0.1
    assert score(tiny, dataclasses.replace(song, stems=loud), segment=1.0).leak is None
    with pytest.raises(ValueError, match="8000 Hz"):
        score(tiny, dataclasses.replace(song, sample_rate=44_100))
