"""What is worth trying on a model, and what isn't."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from lightning_compress import CompressionError
from lightning_compress.choosing import advise
from lightning_compress.choosing.advice import Advice, Speed, Trial
from lightning_compress.modules.agreement import Agreement
from tests.support.oracles import assert_same_state, snapshot

PTQ = "lightning_compress.PostTrainingQuantization"


def trial(name: str, speed: float, size: float = 1.0, cosine: float = 1.0, noise: float = 0.01) -> Trial:
    speeds = {1: Speed(1.0, 0.99, 1.01), 8: Speed(speed, speed - noise, speed + noise)}
    callback = {"class_path": PTQ, "init_args": {"scheme": name}}
    return Trial(name, callback, speeds, size, Agreement(cosine, None, 2))


def advice(*trials: Trial) -> Advice:
    return Advice("Net", 1000, 4000, 5000.0, 8, 10.0, {"Conv2d": 7.0, "ReLU": 1.0}, trials)


def test_what_is_faster_comes_before_what_is_only_smaller_and_the_fastest_first() -> None:
    found = advice(
        trial("smaller", 1.0, 0.3), trial("fast", 1.5), trial("smallest", 1.0, 0.1), trial("faster", 2.5, 0.26)
    )
    assert [trial.name for trial in found.worth] == ["faster", "fast", "smallest", "smaller"]
    assert yaml.safe_load(found.to_yaml()) == {"class_path": PTQ, "init_args": {"scheme": "faster"}}
    said = str(found)
    assert "try first: faster, 2.5 times faster at batch size 8, 26% of the bytes" in said
    assert "then: smallest, no faster, 10% of the bytes" in said
    assert "where its time goes: Conv2d 70%, ReLU 10%, between layers 20%" in said
    assert yaml.safe_load(said.partition("# for trainer.callbacks")[2]) == yaml.safe_load(found.to_yaml())


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (trial("x", 3.0, 0.2, cosine=0.9), "its outputs agree by 0.900 only"),
        (trial("x", 1.0, 0.9), "no faster and hardly smaller"),
        (trial("x", 1.3, 0.9, noise=0.3), "no faster and hardly smaller"),  # that is noise
        (Trial("x", {}, {1: Speed(0.5, 0.4, 0.6), 8: Speed(2.0, 1.9, 2.1)}, 1.0, Agreement(1.0, None, 2)), "no faster"),
        (Trial("x", {}, problem="it has no layer"), "it has no layer"),
    ],
)
def test_what_is_not_worth_it_is_said_with_the_reason(bad: Trial, reason: str) -> None:
    found = advice(bad)
    assert (found.worth, found.to_yaml()) == ([], "")
    assert "try first: nothing of this" in str(found)
    assert f"don't bother with: x ({reason}" in str(found)


def test_what_is_smaller_and_slower_says_so() -> None:
    slow = Trial("x", {}, {1: Speed(0.5, 0.4, 0.6), 8: Speed(2.0, 1.9, 2.1)}, 0.3, Agreement(1.0, None, 2))
    assert "try first: x, SLOWER, 0.50 times the speed at batch size 1, 30% of the bytes" in str(advice(slow))


def test_channels_may_leave_where_training_gets_the_outputs_back() -> None:
    channels = trial("channels", 1.4, 0.6, cosine=0.85)
    assert not channels.refusal
    assert "train it afterwards" in str(advice(channels))
    assert trial("channels", 1.4, 0.6, cosine=0.7).refusal


def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 6 * 6, 5))
    return model, [torch.randn(4, 3, 8, 8) for _ in range(5)]


def test_trials_are_measured_and_the_model_is_left_as_it_is() -> None:
    model, batches = network()
    before = snapshot(model)

    def distance(of: nn.Module) -> Tensor:
        with torch.no_grad():
            return (of(batches[4]) - model(batches[4])).square().mean(1)

    found = advise(model, batches, distance, mode="min")
    assert_same_state(snapshot(model), before)
    assert model.training
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.macs == 8 * 8 * 27 * 16 + 6 * 6 * 144 * 16 + 576 * 5
    assert found.samples == 4
    assert set(found.times) == {"Conv2d", "BatchNorm2d", "ReLU", "Flatten", "Linear"}
    measured = {trial.name: trial for trial in found.trials if not trial.problem}
    assert measured.keys() >= {"int8_static", "channels", "int8_weight_only"}
    for trial in measured.values():
        assert set(trial.speeds) == {1, 4}
        assert trial.agreement is not None and trial.agreement.batches == 2
        assert trial.drop is not None and trial.drop.value >= 0
    assert measured["int8_static"].size < 0.6
    assert measured["channels"].size < 0.9


def test_no_trial_begins_when_the_time_is_over() -> None:
    found = advise(*network(), seconds=0.0)
    assert all(trial.problem == "the 0 seconds were over" for trial in found.trials)
    assert "not tried: int8_dynamic (the 0 seconds were over)" in str(found)
    assert "don't bother" not in str(found)


def test_a_model_in_which_nothing_can_be_done_gets_reasons() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    found = advise(Scale(), [torch.ones(2, 3)] * 3)
    assert not found.worth
    assert all(trial.problem for trial in found.trials)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batches": torch.ones(2, 3)}, "`batches` must be batches"),
        ({"batches": [torch.ones(2, 3)] * 2}, "`batches` must give 3 batches or more"),
        ({"mode": "up"}, "`mode` must be 'max' or 'min'"),
    ],
)
def test_errors(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        advise(nn.Linear(3, 3), **{"batches": [torch.ones(2, 3)] * 3, **arguments})
