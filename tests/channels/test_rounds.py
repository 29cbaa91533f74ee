"""The rounds of a fit without a Trainer: what is due when, what a round takes, and what a checkpoint must hold."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from lightning_compress import CompressionError, Linear, OneShot, Steps, Targets, Window, remove_channels_
from lightning_compress.channels.planning.recipe import LEAST, SCOPE, make_recipe
from lightning_compress.channels.rounds import Rounds
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.schedules import Schedule
from lightning_compress.window import Bounds

X = torch.ones(2, 8)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 2))


FIXED = {"params": None, "macs": None, "scope": SCOPE, "targets": Targets(), "overrides": None, "round_to": None}


def rounds(
    schedule: Schedule = Linear(),  # noqa: B008  frozen
    window: Window = Window(0.0, 0.5),  # noqa: B008  frozen
    **changes: Any,
) -> Rounds:
    options = {"channels": 0.5, "latency": None, "importance": "l1", "min_layer_channels": LEAST, "seed": 0}
    return Rounds(make_recipe(**{**FIXED, **options, **changes}), schedule, window)


def subject(model: nn.Module) -> Subject:
    return Subject(model, [lambda twin: twin(X)])


def carry_out(rounds: Rounds, model: nn.Module, progress: float, step: int = 0) -> None:
    plan = rounds.plan(subject(model), progress, step, lambda value: value)
    rounds.advance(plan)
    remove_channels_(model, plan)


def widths(model: nn.Module) -> list[int]:
    return [len(model[0].bias), len(model[2].bias)]


def test_a_round_is_due_when_a_tenth_more_is_asked_for() -> None:
    state = rounds()
    assert [progress for progress in (0.0, 0.05, 0.1, 0.3) if state.is_due(progress)] == [0.1, 0.3]
    assert not state.is_due(None)
    state.asked = 0.3
    assert not state.is_due(0.35) and state.is_due(0.4) and state.is_due(1.0)
    state.asked = 0.95
    assert state.is_due(1.0)
    state.asked = 1.0
    assert state.is_final and not state.is_due(1.0)


def test_a_round_waits_for_a_batch_that_shows_what_the_module_does() -> None:
    state = rounds()
    assert state.start(0.2, step=3) is None
    assert (state.take_waiting(), state.take_waiting()) == (0.2, None)
    state.batch = ("batch", 7)
    assert state.start(0.3, step=4) == ("batch", 7)
    assert state.batch is None and state.take_waiting() is None
    state.batch = ("batch", 0)
    assert state.start(0.0, step=0) is None
    assert state.take_waiting() == 0.0


def test_the_module_is_traced_once_and_after_each_round_where_steps_need_its_groups() -> None:
    model, state = net(), rounds(schedule=Steps([0.5, 1.0], [0.5, 1.0]))
    assert state.needs_groups(False) and state.needs_groups(True)
    state.trace(subject(model))
    state.checked = True
    assert not state.needs_groups(True)
    carry_out(state, model, 0.5)
    assert state.needs_groups(True) and not state.needs_groups(False)
    carry_out(state, model, 1.0)
    assert not state.needs_groups(True)
    state.begin_fit()
    assert not state.needs_groups(True), "the last channels have left"
    state.reset()
    assert state.needs_groups(False)


def test_what_cant_be_removed_is_said_by_the_first_trace_alone() -> None:
    state = rounds(targets=Targets(exclude=["*"]))
    with pytest.raises(CompressionError, match="must have channels that can be removed"):
        state.trace(subject(net()))
    state.checked = True
    state.trace(subject(net()))


def test_rounds_lead_to_the_budget_of_the_original() -> None:
    model, state = net(), rounds(schedule=Linear())
    for step, (progress, remaining) in enumerate(((0.4, 0.8), (0.7, 0.65), (1.0, 0.5))):
        carry_out(state, model, progress, step)
        assert state.remaining == pytest.approx(remaining, abs=0.02)
        assert sum(widths(model)) == pytest.approx(60 * remaining, abs=1)
        assert state.outcome(step)[0].startswith(f"ChannelPruning, after step {step}:")
    assert [plan.before.channels for plan in state.plans] == [60, 60, 60]
    assert [row.before for row in state.plans[-1].rows] == [40, 20]
    assert [row.after for row in state.plans[-1].rows] == widths(model)
    assert len(state.outcome(3)) > 2 and state.missed == ""


def test_what_was_missed_is_noted_at_the_end() -> None:
    model, state = net(), rounds(channels=0.05, min_layer_channels=0.5)
    carry_out(state, model, 0.5)
    assert state.missed == ""
    carry_out(state, model, 1.0)
    assert state.missed.startswith("The budget is missed: channels=0.05 was asked for")
    assert state.notes() == [f"ChannelPruning: {state.missed}"]


def test_a_state_that_is_saved_goes_on_as_if_nothing_had_happened() -> None:
    model, state = net(), rounds(importance="random")
    carry_out(state, model, 0.5, 10)
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    buffer.seek(0)
    resumed = rounds(importance="random")
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    plans = [which.plan(subject(model), 1.0, 20, lambda value: value) for which in (state, resumed)]
    assert str(plans[0]) == str(plans[1])
    assert all(
        torch.equal(indices, plans[1].kept[name][dim])
        for name, dims in plans[0].kept.items()
        for dim, indices in dims.items()
    )
    assert state.state_dict() == resumed.state_dict() != rounds().state_dict()


def test_a_latency_budget_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_compress.channels.planning import search

    monkeypatch.setattr(search, "latency_ratio", lambda before, after, run: len(after[0].bias) / 40)
    model, state = net(), rounds(channels=None, latency=0.5)
    carry_out(state, model, 0.5)
    assert state.latency == pytest.approx(0.5, abs=0.05)
    monkeypatch.setattr(search, "latency_ratio", lambda *_: pytest.fail("measured again"))
    resumed = rounds(channels=None, latency=0.5)
    resumed.load_state_dict(state.state_dict())
    carry_out(resumed, model, 1.0)
    assert resumed.logged == "macs" and resumed.latency == state.latency


def test_gradients_are_summed_and_the_least_important_units_drawn_to_zero() -> None:
    model, state = net(), rounds(importance="taylor")
    model(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    state.use_gradients_(model, set(), 0.0)
    assert state.scores == {}, "nothing is known of the module yet"
    state.trace(subject(model))
    state.use_gradients_(model, set(), 0.0)
    once = {name: scores.clone() for name, scores in state.scores.items()}
    state.use_gradients_(model, {id(model[0].weight)}, 0.1)
    assert set(once) == {"0", "2"}
    assert all(torch.equal(state.scores[name], 2 * scores) for name, scores in once.items())
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter.grad, before[name])}
    assert moved == {"0.weight"}


@pytest.mark.parametrize(
    ("other", "bounds", "other_bounds", "start"),
    [
        (Window(0.4, 0.8), None, None, "start=0.5, unit='fit'"),
        (Window(0.5, 0.8), None, None, ""),
        (Window(0.2, 0.8), Bounds(0, 50), Bounds(20, 80), "start=0.5, unit='fit'"),
        (Window(40, 80, unit="step"), None, None, ""),
        (Window(40, 80, unit="step"), Bounds(0, 50), Bounds(40, 80), "start=50, unit='step'"),
        (Window(50, 80, unit="step"), Bounds(0, 50), Bounds(50, 80), ""),
    ],
)
def test_a_window_that_begins_too_early_is_told_where_to_start(
    other: Window, bounds: Bounds | None, other_bounds: Bounds | None, start: str
) -> None:
    assert rounds().overlap(other, bounds, other_bounds) == start


def test_all_leave_at_the_start_of_one_shot() -> None:
    state = rounds(schedule=OneShot(), window=Window(0.2, 0.5))
    assert (state.last_place, state.last_step(Bounds(20, 50))) == (0.2, 20)
    assert state.overlap(Window(0.2, 0.8), None, None) == ""


def test_a_pickle_holds_neither_batches_nor_groups() -> None:
    state = rounds()
    state.trace(subject(net()))
    state.batch, state.asked = (X, 0), 0.5
    loaded = pickle.loads(pickle.dumps(state))
    assert loaded.groups is None and loaded.batch is None and loaded.asked == 0.5
