"""Ramps: the numbers of each step against their formula, through accumulation, resumption and a second fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_compress import Cosine, FeatureMSE, OneShot, SoftTarget, Window
from lightning_compress.distillation import Distillation, DistillationModule, Ramp
from lightning_compress.distillation.ramps import Clock
from lightning_compress.errors import CompressionError
from tests.distillation.nets import ConvNet, assert_same_bits, bits, loader, trainer
from tests.distillation.own import Own, assert_close, kd, large
from tests.support.data import Resumable

pytestmark = pytest.mark.filterwarnings(
    # The module can validate; these runs have nothing to validate on.
    "ignore:You defined a `validation_step` but have no:UserWarning",
    "ignore:The dirpath has changed",
    "ignore:Be aware that when using `ckpt_path`",
)
WAYS = pytest.mark.parametrize("way", ["module", "callback"])


class Weights(Callback):
    """The weight of each term in each batch, found from what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        names = [name.removesuffix("_weighted") for name in logged if name.endswith("_weighted")]
        self.rows.append({name.removeprefix("train_"): logged[f"{name}_weighted"] / logged[name] for name in names})

    def of(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


def build(way: str, **kwargs: Any) -> tuple[Any, list[Callback]]:
    teacher = large()
    arguments = {"losses": [SoftTarget()], "task_weight": 0.25, **kwargs}
    if way == "module":
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
        torch.manual_seed(5)
        return DistillationModule(ConvNet(), teacher, optimizer=sgd, **arguments), []
    return Own(), [Distillation(teacher, **arguments)]


def run(way: str, ramps: list[Ramp], data: Any = None, ckpt_path: Any = None, **kwargs: Any) -> tuple[Any, Weights]:
    options = {name: kwargs.pop(name) for name in ("losses", "task_weight") if name in kwargs}
    (module, callbacks), weights = build(way, ramps=ramps, **options), Weights()
    callbacks = [*callbacks, weights, *kwargs.pop("callbacks", [])]
    trainer(callbacks=callbacks, **kwargs).fit(module, loader(40) if data is None else data, ckpt_path=ckpt_path)
    return module, weights


@WAYS
def test_the_weight_of_each_step(way: str) -> None:
    ramps = [
        Ramp("soft_target", initial=0.0, schedule=Cosine(), window=Window(0.2, 0.8)),
        Ramp("task", initial=1.0, schedule=OneShot(), window=Window(4, unit="step")),
    ]
    _, weights = run(way, ramps, max_epochs=2)
    expected = [0.75 * (1 - math.cos(math.pi * min(max((k - 2) / 6, 0), 1))) / 2 for k in range(10)]
    assert weights.of("soft_target") == pytest.approx(expected, abs=1e-6)
    assert weights.of("task") == pytest.approx([1.0] * 4 + [0.25] * 6, abs=1e-6)


@WAYS
def test_accumulated_batches_share_a_step(way: str) -> None:
    ramps = [Ramp("soft_target", initial=0.0)]
    _, weights = run(way, ramps, accumulate_grad_batches=2, max_epochs=2)  # 5 batches an epoch: 3 steps
    expected = [0.75 * step / 6 for step in (0, 0, 1, 1, 2, 3, 3, 4, 4, 5)]
    assert weights.of("soft_target") == pytest.approx(expected, abs=1e-6)


@WAYS
def test_a_falling_temperature_equals_a_loop_by_hand(way: str) -> None:
    module, _ = run(way, [Ramp("soft_target", "temperature", initial=8.0, window=Window(0.0, 0.8))])
    twin, teacher = Own(), large().eval()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(loader(40)):
        temperature = 8.0 - 6.0 * min(step / 4, 1)
        logits = twin(x)
        optimizer.zero_grad()
        (0.25 * F.cross_entropy(logits, y) + 0.75 * kd(logits, teacher(x).detach(), temperature)).backward()
        optimizer.step()
    student = module.student if way == "module" else module.net
    assert_close(bits(student), bits(twin.net))


@WAYS
@pytest.mark.parametrize("every", [2, 3])
def test_resumed_in_the_middle_of_a_ramp_equals_uninterrupted(way: str, every: int, tmp_path: Path) -> None:
    def data() -> Any:
        return Resumable(list(loader(40)))

    ramps = [
        Ramp("soft_target", "temperature", initial=9.0, schedule=Cosine(), window=Window(0.1, 0.9)),
        Ramp("feature_mse", initial=3.0, window=Window(1, unit="epoch")),
    ]
    tapped = "features.0" if way == "module" else "net.features.0"
    options = {"losses": [SoftTarget(), FeatureMSE(tapped, "features.0")], "max_epochs": 3}
    save = ModelCheckpoint(tmp_path / "whole", filename="{step}", every_n_train_steps=every, save_top_k=-1)
    if way == "module":
        # Its dry run has no items to borrow from such a loader.
        ConvNet.example_input_array = torch.zeros(2, 1, 8, 8)
    try:
        whole, first = run(way, ramps, data(), callbacks=[save], enable_checkpointing=True, **options)
        for step in (every, 2 * every):
            path = tmp_path / "whole" / f"step={step}.ckpt"
            resumed, second = run(way, ramps, data(), path, **options)
            assert_same_bits(bits(whole), bits(resumed))
            assert second.rows == first.rows[step:]
    finally:
        if way == "module":
            del ConvNet.example_input_array
    assert len({round(weight, 4) for weight in first.of("feature_mse")}) > 5


@WAYS
def test_bounds_stay_where_they_were_when_a_longer_fit_goes_on(way: str, tmp_path: Path) -> None:
    ramps, save = [Ramp("soft_target", initial=0.0)], ModelCheckpoint(tmp_path, filename="last")
    run(way, ramps, callbacks=[save], enable_checkpointing=True, max_epochs=2)
    _, weights = run(way, ramps, ckpt_path=tmp_path / "last.ckpt", max_epochs=3)
    assert weights.of("soft_target") == pytest.approx([0.75] * 5)


@WAYS
def test_each_fit_begins_anew(way: str) -> None:
    (module, callbacks), weights = build(way, ramps=[Ramp("soft_target", initial=0.0)]), Weights()

    class Fails(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        trainer(callbacks=[*callbacks, weights, Fails()]).fit(module, loader(40))
    for _ in range(2):
        trainer(callbacks=[*callbacks, weights]).fit(module, loader(40))
    rows = [0.75 * step / 5 for step in range(5)]
    assert weights.of("soft_target") == pytest.approx([0.0, *rows, *rows], abs=1e-6)


def test_a_ramp_of_pairs_moves_them_all() -> None:
    def stages(width: int) -> torch.nn.Sequential:
        second = torch.nn.Conv2d(width, width, 3, stride=2, padding=1)
        end = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 4)]
        return torch.nn.Sequential(torch.nn.Conv2d(1, width, 3, padding=1), second, *end)

    weights = Weights()
    ramps = [Ramp("feature_mse", initial=1.0)]
    callback = Distillation(stages(8), [FeatureMSE(pairs="auto", weight=0.2)], ramps=ramps)
    trainer(callbacks=[callback, weights]).fit(Own(stages(4)), loader(40))
    names = [name for name in weights.rows[0] if name.startswith("feature_mse")]
    assert len(names) == 3  # two maps, and what pooling leaves of them
    total = [sum(row[name] for name in names) for row in weights.rows]
    assert total == pytest.approx([1.0 - 0.8 * step / 5 for step in range(5)], abs=1e-6)
    assert all(len({round(row[name], 6) for name in names}) == 1 for row in weights.rows)


def test_a_task_that_fades_out() -> None:
    ramps = [Ramp("task", initial=1.0, window=Window(0.0, 0.6))]
    _, weights = run("module", ramps, task_weight=0.0)
    assert [row.get("task", 0.0) for row in weights.rows[:3]] == pytest.approx([1.0, 2 / 3, 1 / 3], abs=1e-6)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield from loader(40).dataset


@WAYS
def test_a_fit_of_unknown_length_wants_steps(way: str) -> None:
    data = DataLoader(Endless(), batch_size=8)
    _, weights = run(way, [Ramp("soft_target", window=Window(1, 3, unit="step"))], data, limit_train_batches=5)
    assert weights.of("soft_target") == pytest.approx([0.0, 0.0, 0.375, 0.75, 0.75], abs=1e-6)
    _, weights = run(way, [Ramp("soft_target")], data, max_steps=3, max_epochs=-1)
    assert weights.of("soft_target") == pytest.approx([0.0, 0.25, 0.5], abs=1e-6)

    class Stop(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            raise AssertionError("a batch was trained")

    with pytest.raises(CompressionError, match="`window` with unit='fit'.*unit='step'"):
        run(way, [Ramp("soft_target")], data, max_epochs=1, callbacks=[Stop()])


def test_a_loss_says_its_own_numbers_while_no_fit_has_begun() -> None:
    clock = Clock([Ramp("soft_target", initial=0.0), Ramp("*target*", "temperature", initial=9.0)])
    assert clock.loss("soft_target", SoftTarget(weight=0.5)) == SoftTarget(weight=0.5)
    clock.start(10, 10)
    assert clock.loss("soft_target", SoftTarget(weight=0.5)) == SoftTarget(weight=0.0, temperature=9.0)
    clock.step = 10
    assert clock.loss("soft_target", SoftTarget(weight=0.5)) == SoftTarget(weight=0.5)


def test_two_ramps_of_one_number_are_refused() -> None:
    up, down = Ramp("soft_target", window=Window(0.0, 0.3)), Ramp("soft_*", initial=2.0, window=Window(0.5, 1.0))
    with pytest.raises(CompressionError, match="ramp"):
        Distillation(large(), ramps=[up, down])
