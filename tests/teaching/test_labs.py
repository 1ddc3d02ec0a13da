"""The labs' ablations and changes to a trained model."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import partial

import pytest
import torch

from bsmamba2.kernels import accelerate
from bsmamba2.synth import synthesise
from bsmamba2.teaching import demos, labs
from bsmamba2.teaching.explorables import significand
from bsmamba2.train import LOSSES

SONG = partial(synthesise, 7, seconds=1.5, occupancy=0.7)


# --- ablation ---------------------------------------------------------------------------------------------


def test_ablated_models_lack_what_was_taken_away() -> None:
    choices: list[dict[str, str]] = [{}, {"directions": "forwards only"}, {"sequence_layer": "LSTM"}]
    whole, forwards, lstm = (labs.ablated_model(**choice) for choice in choices)
    sizes = [sum(part.numel() for part in model.parameters()) for model in (whole, forwards)]
    assert sizes[1] < sizes[0]
    names = [{type(part).__name__ for part in model.modules()} for model in (whole, forwards, lstm)]
    assert ["Mamba2" in found for found in names] == [True, True, False]
    # A change at the end of a sequence reaches its beginning only by way of the layers that read backwards.
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    later = x.clone()
    later[:, -1] += 1
    heard = [
        (model.layers[0].time(later) - model.layers[0].time(x))[:, 0].abs().max() > 1e-6 for model in (whole, forwards)
    ]
    assert heard == [True, False]


def test_sequence_layers_of_every_state_have_about_equal_size() -> None:
    for state in labs.OPTIONS["state"]:
        sizes = {
            name: sum(part.numel() for part in labs.ablated_model(sequence_layer=name, state=state).parameters())
            for name in labs.OPTIONS["sequence_layer"]
        }
        assert sizes.keys() == {"Mamba-2", "attention", "LSTM", "GRU"}
        assert sizes == pytest.approx(dict.fromkeys(sizes, sizes["Mamba-2"]), rel=0.02)


def test_gru_against_its_equations() -> None:
    torch.manual_seed(0)
    gru, x = labs.GRU(3, 4), torch.randn(2, 5, 3)
    weights, biases = (gru.gru.weight_ih_l0, gru.gru.weight_hh_l0), (gru.gru.bias_ih_l0, gru.gru.bias_hh_l0)
    state, outputs = torch.zeros(2, 4), []
    for t in range(5):
        (reset, update, new), (old_reset, old_update, old) = (
            (v @ weight.mT + bias).chunk(3, dim=-1)
            for v, weight, bias in zip((x[:, t], state), weights, biases, strict=True)
        )
        keep = (update + old_update).sigmoid()
        state = keep * state + (1 - keep) * (new + (reset + old_reset).sigmoid() * old).tanh()
        outputs.append(state @ gru.out_proj.weight.mT)
    torch.testing.assert_close(gru(x), torch.stack(outputs, dim=1))


def test_sizes_of_an_ablated_model() -> None:
    for state in labs.OPTIONS["state"]:
        config = labs.ablated_model(bands=4, layers=2, state=state, sequence_layer="attention").config
        assert (len(config.freqs_per_bands), config.depth, config.d_state) == (4, 2, state)


@pytest.mark.parametrize(
    ("mask", "real", "bounded"), [("complex", False, False), ("real", True, False), ("within ±1", False, True)]
)
def test_mask_of_an_ablated_model(mask: str, real: bool, bounded: bool) -> None:
    model = labs.ablated_model(mask=mask)
    for band in model.mask_estimators[0].bands:
        band.project.bias.data += 3  # an untrained mask is small
    found = torch.view_as_real(model.masks(spectrum()).detach() + 0j)
    assert bool((found[..., 1] == 0).all()) is real
    assert bool((found.abs() <= 1).all()) is bounded


def test_only_the_rms_norm_lets_near_silence_fade() -> None:
    for norm, fades in (("unit norm", False), ("RMS norm", True)):
        model = labs.ablated_model(norm=norm)
        loud, quiet = (model.band_split(factor * spectrum()).detach() for factor in (1, 1e-5))
        assert torch.allclose(loud, quiet, atol=1e-4) is not fades
        assert (type(model.final_norm).__name__ == "RMSNorm") is fades


def spectrum() -> torch.Tensor:
    return torch.randn(1, 2, labs.BINS, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_ablation_repeats_and_differs_by_its_loss() -> None:
    seen: list[int] = []
    runs = [labs.ablate(loss=loss, steps=2, on_step=lambda step: seen.append(step.step)) for loss in LOSSES]
    assert seen == [1, 2, 1, 2]
    assert [len(run.losses) for run in runs] == [2, 2]
    assert len({run.usdr for run in runs}) == len(LOSSES) == 2
    again = labs.ablate(steps=2)
    assert (again.usdr, again.losses) == (runs[0].usdr, runs[0].losses)
    assert again.estimate.shape == again.song.vocals.shape
    assert again.parameters == sum(part.numel() for part in labs.ablated_model().parameters())


@pytest.mark.parametrize("field", ["sequence_layer", "directions", "loss", "mask"])
def test_an_unknown_ablation_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='none' must be '"):
        labs.ablate(**{field: "none"})
    with pytest.raises(ValueError, match="option 'colour' must be 'sequence_layer' or"):
        labs.ablate(colour="none")


def test_one_thread_and_as_many_as_before() -> None:
    before = torch.get_num_threads()
    with labs.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


# --- changes to a trained model ---------------------------------------------------------------------------


def test_each_change_changes_the_estimate_and_is_undone() -> None:
    torch.manual_seed(0)
    model = labs.ablated_model(bands=4)
    accelerate(model)
    song = SONG(sample_rate=labs.RATE, occupancy=0.5)
    runs = {change: labs.with_change(model, song, change) for change in labs.CHANGES}
    bands = runs.pop("layers along time: bands shuffled")  # each band is a sequence of its own
    torch.testing.assert_close(bands.estimate, runs["none"].estimate)
    assert len({run.usdr for run in runs.values()}) == len(runs) == len(labs.CHANGES) - 1
    with torch.inference_mode():
        assert torch.equal(model(song.mixture[None])[0, 0], runs["none"].estimate)
    samples = torch.arange(song.samples) / song.sample_rate
    silent = torch.stack([(samples < start) | (samples >= end) for start, end in song.vocal_segments]).all(0)
    powers = [float(signal[:, silent].square().sum()) for signal in (runs["none"].estimate, song.mixture)]
    assert runs["none"].level_in_silence == pytest.approx(10 * math.log10(powers[0] / powers[1]), abs=0.01)
    with pytest.raises(ValueError, match="change='magic' must be 'none' or"):
        labs.with_change(model, song, "magic")


@pytest.mark.parametrize(
    ("change", "differs"), [("no layers along time", "time"), ("no backward layers along time", "backwards")]
)
def test_a_removed_part_passes_its_input_on(change: str, differs: str) -> None:
    model = labs.ablated_model()
    x, block = torch.randn(2, 6, 32), model.layers[0].time
    with labs.changed_model(model, change, torch.ones(6, dtype=torch.bool)), torch.no_grad():
        passed = {"time": model.layers[0].time, "backwards": block.backwards}[differs]
        assert torch.equal(passed(x), x)
    assert model.layers[0].time is block


@pytest.mark.parametrize(("change", "name", "axis"), [(change, *where) for change, where in labs.SHUFFLED.items()])
def test_a_block_gets_shuffled_sequences_and_its_output_is_put_back(change: str, name: str, axis: int) -> None:
    model = labs.ablated_model()
    block = model.layers[0].get_submodule(name)
    x, seen = torch.arange(84.0).view(6, 7, 2), []
    block.forward = lambda x: seen.append(x) or 10 * x  # type: ignore[func-returns-value]
    with labs.changed_model(model, change, torch.ones(7, dtype=torch.bool)):
        assert torch.equal(block(x), 10 * x)
    assert not torch.equal(seen[0], x)
    assert torch.equal(seen[0].sort(axis).values, x)  # the same sequences or frames, in a different order
    assert torch.equal(block(x), seen[1] * 10)
    assert torch.equal(seen[1], x)


def test_steps_are_zero_in_the_silence_of_both_directions() -> None:
    model = labs.ablated_model()
    block, seen = model.layers[0].time, []

    def scan(x: torch.Tensor, dt: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append((dt == 0).flatten(2).all(2).all(0))
        return x

    block.forwards.mixer.scan = block.backwards.mixer.scan = scan
    sung = torch.tensor([True, True, False, True, False])
    with labs.changed_model(model, "Δ = 0 in silence", sung):
        block(torch.randn(2, 5, 32))
    assert torch.equal(torch.stack(seen), ~torch.stack([sung, sung.flip(0)]))


@pytest.mark.parametrize("bits", [4, 8, 24])
def test_rounded_decay_against_a_loop(bits: int) -> None:
    x, dt, A, B, C = demos.scan_inputs(1, 40, heads=3, headdim=2, d_state=4)
    A = torch.tensor([-0.01, -1.0, -30.0])  # in 8 bits the first head's decay is 1
    D = torch.tensor([1.0, 2.0, 3.0])
    y = labs.scan_with_rounded_decay(x, dt, A, B, C, D, bits=bits)
    for head in range(3):
        state = torch.zeros(2, 4)
        for t in range(40):
            decay = significand(math.exp(float(dt[0, t, head]) * float(A[head])), bits)
            state = decay * state + float(dt[0, t, head]) * x[0, t, head, :, None] * B[0, t]
            expected = state @ C[0, t] + D[head] * x[0, t, head]
            torch.testing.assert_close(y[0, t, head], expected, rtol=2e-3, atol=2e-3)


# --- view of a lab ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("button", ["", "Train"])
def test_a_lab_shows_that_it_computes(button: str) -> None:
    widgets = pytest.importorskip("ipywidgets")
    control = widgets.IntSlider(1, description="Number")
    states: list[tuple[int, bool]] = []

    def show(number: int) -> None:
        busy = "computing" in status.value and "stale" in output._dom_classes
        states.append((number, busy))
        if number == 3:
            raise ArithmeticError("planted")

    status, output = widgets.HTML(), widgets.Output()  # until the view has its own
    view = labs.lab(show, {"number": control}, button=button)
    assert len(states) == (not button)  # at once, or when the button is pressed
    *_, status, output = view.children
    press = view.children[1].click if button else lambda: None
    control.value = 2
    press()
    assert states[-1] == (2, True)
    assert len(states) == 2 - bool(button)
    with suppress(ArithmeticError):  # a button only logs it
        control.value = 3
        press()
    assert states[-1] == (3, True)
    assert (status.value, "stale" in output._dom_classes) == ("ready", False)
    assert not (button and view.children[1].disabled)
