"""The training loop: gradients, precision, schedules, and resuming with the same bits."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import re
from collections.abc import Iterator
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from tiny_model import TINY
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bsmamba2 import BSMamba2
from bsmamba2.losses import bsmamba2_loss, snr_loss
from bsmamba2.train import TrainConfig, Trainer, learning_rate, parameter_groups


def noise(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    while True:
        target = torch.randn(2, 2, 3000, generator=g)
        yield target + torch.randn(2, 2, 3000, generator=g), target


def clips(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(mixture[:1], target[:1]) for mixture, target in islice(noise(), count)]


def test_a_trainer_may_take_the_other_loss(tiny: BSMamba2) -> None:
    mixture, target, *_ = next(iter(clips(1)))
    wanted = snr_loss(tiny(mixture)[:, 0], target, mixture).item()
    (step,) = Trainer(tiny, TrainConfig(steps=1, loss="snr")).run([(mixture, target)])
    assert step.loss == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ValueError, match="loss='l1' must be published or snr"):
        TrainConfig(steps=1, loss="l1")


def test_one_example_is_learned_by_heart(tiny: BSMamba2) -> None:
    g = torch.Generator().manual_seed(0)
    wave = torch.sin(torch.arange(3000) / 8000 * 2 * math.pi * 440).expand(1, 2, -1)
    pair = (wave + 0.5 * torch.randn(1, 2, 3000, generator=g), wave)
    steps = list(Trainer(tiny, TrainConfig(steps=15, lr=1e-2, schedule="cosine")).run([pair] * 15))
    assert [step.step for step in steps] == list(range(1, 16))
    assert steps[-1].loss < 0.5 * steps[0].loss


def test_a_run_repeats_bit_for_bit() -> None:
    def weights() -> list[Tensor]:
        torch.manual_seed(0)
        trainer = Trainer(BSMamba2(TINY), TrainConfig(steps=3))
        list(trainer.run(noise()))
        return [*trainer.model.parameters(), *trainer.ema.parameters()]

    assert all(torch.equal(one, two) for one, two in zip(weights(), weights(), strict=True))


def test_the_average_is_the_moving_average_from_the_initial_weights_on(tiny: BSMamba2) -> None:
    trainer = Trainer(tiny, TrainConfig(steps=4, ema_decay=0.5))
    seen, average = [], tiny.final_norm.gain.detach().clone()
    for _ in trainer.run(noise()):
        seen.append(tiny.final_norm.gain.detach().clone())
        average = 0.5 * average + 0.5 * seen[-1]
    torch.testing.assert_close(trainer.ema.final_norm.gain.detach(), average)
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
        assert len(taken) == 3 * step.step
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
    """Notes the types that matrix products are given, forwards and backwards, and those of transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "mv", "convolution"):
            self.seen.setdefault("products", set()).update(a.dtype for a in args[:3] if isinstance(a, Tensor))
        elif "fft" in name:
            self.seen.setdefault("transforms", set()).update(a.dtype for a in args[:1])
        return func(*args, **(kwargs or {}))


def elementwise(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **_: Any) -> Tensor:
    """Stands in for the scan, whose plain form computes in float32, whatever surrounds it; it has no matrix product."""
    return (x * (dt * A + D)[..., None] + (B * C).sum(-1)[..., None, None]).to(x.dtype)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)], ids=["bfloat16", "float32"]
)
@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["stored", "recomputed"])
def test_every_matrix_product_has_the_precision_asked_for(
    precision: str, dtype: torch.dtype, gradient_checkpointing: bool
) -> None:
    tiny = BSMamba2(TINY, scan=elementwise)
    trainer = Trainer(tiny, TrainConfig(steps=1, precision=precision, gradient_checkpointing=gradient_checkpointing))
    with Products() as products:
        trainer.backward(clips(1))
    assert products.seen["products"] == {dtype}
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
    trainer = Trainer(tiny, TrainConfig(steps=2, compile=True))
    with pytest.warns(UserWarning, match=r"without it \(RuntimeError: no C\+\+ compiler here\)") as warned:
        steps = list(trainer.run(clips(2)))
    assert len(warned) == 1
    assert steps == list(Trainer(plain, TrainConfig(steps=2)).run(clips(2)))


def test_decays_and_skips_are_exempt_from_weight_decay(tiny: BSMamba2) -> None:
    decayed, exempt = parameter_groups(tiny, 0.01)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.01, 0.0)
    assert len(exempt["params"]) == 3 * 4  # A_log, D, dt_bias of four mixers
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(tiny.parameters()))


def test_a_trainer_goes_on_from_its_state_with_the_same_bits(tiny: BSMamba2) -> None:
    config = TrainConfig(steps=5, lr=1e-2, schedule="wsd")
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


def test_schedule() -> None:
    config = TrainConfig(steps=100, lr=1.0, schedule="cosine")
    rates = [learning_rate(step, config) for step in range(1, 101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(one > two for one, two in pairwise(rates[4:]))
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(50, TrainConfig(steps=100, lr=0.5)) == 0.5


def test_wsd_may_go_on() -> None:
    config = TrainConfig(steps=1000, lr=1.0, schedule="wsd")
    rates = [learning_rate(step, config) for step in range(1, 1001)]
    assert rates[:100] == pytest.approx([step / 100 for step in range(1, 101)])
    assert set(rates[100:801]) == {1.0}
    assert rates[800:] == pytest.approx([step / 200 for step in range(200, 0, -1)])
    longer = dataclasses.replace(config, steps=2000)
    assert {learning_rate(step, longer) for step in range(100, 1601)} == {1.0}  # more steps: the fall comes later
    slower = dataclasses.replace(config, decay_ratio=0.42)
    rates = [learning_rate(step, slower) for step in range(1, 1001)]
    assert set(rates[100:581]) == {1.0}
    assert rates[580:] == pytest.approx([step / 420 for step in range(420, 0, -1)])


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


# --- several stems ----------------------------------------------------------------------------------------


def two_stems() -> BSMamba2:
    torch.manual_seed(0)
    return BSMamba2(dataclasses.replace(TINY, stems=("drums", "vocals")))


@pytest.mark.parametrize("loss", ["published", "snr"])
def test_the_loss_of_several_stems_is_the_sum_of_each_one(loss: str) -> None:
    (one, first), (two, second) = clips(2)
    mixture, target = one + two, torch.stack((first, second), 1)
    model, by_hand = two_stems(), two_stems()
    losses = Trainer(model, TrainConfig(steps=1, loss=loss)).backward([(mixture, target)])
    estimate = by_hand(mixture)
    if loss == "snr":
        parts = [snr_loss(estimate[:, i], target[:, i], mixture) for i in range(2)]
    else:
        parts = [bsmamba2_loss(estimate[:, i], target[:, i]) for i in range(2)]
    (parts[0] + parts[1]).backward()
    torch.testing.assert_close(losses[0], (parts[0] + parts[1]).detach())
    assert (parts[0] - parts[1]).abs() > 1e-3  # so that two of one would be found out
    for (name, found), expected in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_a_single_stem_may_have_an_axis_and_gives_the_same_bits(tiny: BSMamba2) -> None:
    with_axis = [(mixture, target[:, None]) for mixture, target in clips(3)]
    trainers = [Trainer(copy.deepcopy(tiny), TrainConfig(steps=3)) for _ in range(2)]
    assert list(trainers[0].run(clips(3))) == list(trainers[1].run(with_axis))
    assert all(map(torch.equal, trainers[0].model.parameters(), trainers[1].model.parameters()))


def test_stems_learn_their_own_targets() -> None:
    """A sine and noise, in this order: after training, each output is nearer to its own target than to the other."""
    wave = torch.sin(torch.arange(3000) / 8000 * 2 * math.pi * 440).expand(1, 2, -1)
    other = 0.5 * torch.randn(1, 2, 3000, generator=torch.Generator().manual_seed(0))
    batch = (wave + other, torch.stack((wave, other), 1))
    trainer = Trainer(two_stems(), TrainConfig(steps=15, lr=1e-2, schedule="cosine"))
    steps = list(trainer.run([batch] * 15))
    assert steps[-1].loss < 0.6 * steps[0].loss
    with torch.no_grad():
        first, second = trainer.separate(batch[0])[0]
    for estimate, own, foreign in ((first, wave[0], other[0]), (second, other[0], wave[0])):
        assert (estimate - own).norm() < 0.5 * (estimate - foreign).norm()


def test_a_target_of_another_number_of_stems_is_refused(tiny: BSMamba2) -> None:
    mixture, target = clips(1)[0]
    with pytest.raises(ValueError, match="target has 1 stems, but the model gives drums, vocals"):
        Trainer(two_stems(), TrainConfig(steps=1)).backward([(mixture, target)])
    with pytest.raises(ValueError, match="target has 2 stems, but the model gives vocals"):
        Trainer(tiny, TrainConfig(steps=1)).backward([(mixture, torch.stack((target, target), 1))])
