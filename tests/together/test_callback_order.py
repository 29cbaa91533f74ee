"""The order of the callbacks in the list changes nothing of what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor

from lightning_compress import (
    ChannelPruning,
    Distillation,
    EMATeacher,
    QuantizationAwareTraining,
    Rewind,
    ScheduledPruning,
    SoftTarget,
    Steps,
    Window,
)
from tests.support.fits import fit
from tests.support.oracles import assert_different_state, assert_same_state

pytestmark = pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides")


def channels(**options: Any) -> ChannelPruning:
    return ChannelPruning(channels=0.5, round_to=1, schedule=Steps([0.0, 1.0], [0.5, 1.0]), **options)


def zeros(method: str, **options: Any) -> ScheduledPruning:
    return ScheduledPruning(method, 0.7, **{"window": Window(0.1, 0.8), **options})


MAKE: dict[str, Callable[[], Callback]] = {
    "ema": lambda: EMAWeightAveraging(decay=0.75),
    "mean": lambda: WeightAveraging(),
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
    "channels": lambda: channels(window=Window(0.05, 0.5)),
    "uncalibrated": lambda: channels(window=Window(0.05, 0.5), calibration_batches=0),
    "zeros": lambda: zeros("lamp"),
    "least squares": lambda: zeros("least_squares", calibration_batches=3),
    "rewinding": lambda: zeros("magnitude", window=Window(3, 9, "step", every_n_steps=3), rewind=Rewind(1, "step")),
    "int8": lambda: QuantizationAwareTraining(),
    "teacher": lambda: Distillation(EMATeacher(0.5), [SoftTarget()], task_weight=0.5),
}


def outcome(names: tuple[str, ...]) -> dict[str, Tensor]:
    """What a fit leaves: the weights, which are the average where there is one, and the masks."""
    callbacks = {name: MAKE[name]() for name in names}
    _, module = fit(*callbacks.values(), max_epochs=3)
    found: dict[str, Tensor] = {key: value for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    for callback in callbacks.values():
        found |= {f"mask of {name}": mask for name, mask in getattr(callback, "masks", {}).items()}
    return found


def sets(*texts: str, slow: bool = False) -> list[Any]:
    return [pytest.param(tuple(text.split(", ")), marks=[pytest.mark.slow] * slow, id=text) for text in texts]


@pytest.mark.parametrize(
    "names",
    sets("ema, channels", "channels, zeros", "channels, teacher", "zeros, teacher")
    + sets("mean, channels", "ema, uncalibrated", "channels, least squares", "channels, rewinding", slow=True)
    + sets("ema, zeros", "swa, channels", "channels, int8", "zeros, int8", "ema, teacher", slow=True),
)
def test_both_orders_give_the_same(names: tuple[str, ...]) -> None:
    first, second = outcome(names), outcome(names[::-1])
    assert_same_state(first, second)
    assert_different_state(first, outcome(names[:1]))


@pytest.mark.parametrize(
    "names",
    sets("ema, channels, zeros, int8")
    + sets("mean, channels, least squares, int8", "teacher, ema, channels, rewinding, int8", slow=True),
)
def test_orders_of_many_give_the_same(names: tuple[str, ...]) -> None:
    expected = outcome(names)
    for other in (names[::-1], names[2:] + names[:2]):
        assert_same_state(expected, outcome(other))


class Listener(Callback):
    """One of the user's, which has nothing to do with the others."""


def test_callbacks_of_the_user_keep_their_places() -> None:
    own = [Listener() for _ in range(3)]
    average, pruning, cut = MAKE["ema"](), MAKE["zeros"](), MAKE["channels"]()
    trainer, _ = fit(own[0], pruning, own[1], cut, average, own[2])
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    assert callbacks[:6] == [own[0], average, own[1], cut, pruning, own[2]]
