"""Batches that a callback measures on, read beside a fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress.calibration import chosen_batches
from lightning_compress.silent_copy import make_probe
from tests.support.data import TinyData
from tests.support.fits import fit
from tests.support.modules import Classifier
from tests.support.oracles import same_random_state

COUNT = 20


def numbers(first: int = 0) -> TensorDataset:
    """Samples that are known by their first number."""
    return TensorDataset(torch.arange(first, first + COUNT)[:, None].expand(-1, 16).float(), torch.arange(COUNT) % 4)


class Takes(Callback):
    """Takes calibration batches before each step, and remembers what the fit itself gets."""

    def __init__(self, count: int = 2) -> None:
        self.count = count
        self.taken: list[Any] = []
        self.own: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.own.append(batch)
        if not self.count:
            return
        with same_random_state():
            _, batches = chosen_batches(trainer, pl_module, make_probe(trainer, pl_module), self.count, seed=0)
        self.taken.append(batches)


class Own(TinyData):
    """A loader of the test's."""

    def __init__(self, loader: Any) -> None:
        super().__init__()
        self.own = loader

    def train_dataloader(self) -> Any:
        return self.own


class Module(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)


def seen(batches: Any) -> list[float]:
    return [value for x, _ in batches for value in x[:, 0].tolist()]


def run(data: Any, module: Any = None, count: int = 2) -> Takes:
    takes = Takes(count)
    fit(takes, module=module or Module(), data=data)
    return takes


@pytest.mark.parametrize("workers", [0, 2])
def test_the_fits_own_iteration_is_not_moved_on(workers: int) -> None:
    options: Any = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = DataLoader(numbers(), batch_size=4, shuffle=True, **options)
    takes = run(Own(loader))
    for epoch in (seen(takes.own[:5]), seen(takes.own[5:])):
        assert sorted(epoch) == list(range(COUNT))  # nothing twice, nothing left out
    assert seen(takes.own[:5]) != seen(takes.own[5:])
    assert {len(seen(batches)) for batches in takes.taken} == {8}
    assert len({tuple(seen(batches)) for batches in takes.taken}) == 1  # the same whenever they are read


class Epochs:
    """Gives batches in an order that changes in place, from a start that moves on, whenever it is read."""

    def __init__(self) -> None:
        self.order, self.epoch = list(range(COUNT)), 0

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        self.order.reverse()
        order = self.order[self.epoch :] + self.order[: self.epoch]
        return iter([order[start : start + 4] for start in range(0, COUNT, 4)])

    def __len__(self) -> int:
        return COUNT // 4


def test_a_sampler_that_remembers_its_epochs_counts_those_of_the_fit() -> None:
    read = Takes(count=2)
    takes = [Takes(count=0), read]
    for callback in takes:
        fit(callback, module=Module(), data=Own(DataLoader(numbers(), batch_sampler=Epochs())))
    assert seen(takes[0].own) == seen(read.own) and len(seen(read.own)) == 2 * COUNT
    assert {len(seen(batches)) for batches in read.taken} == {8}


def test_a_calibration_dataloader_comes_first() -> None:
    module = Module()
    module.calibration_dataloader = lambda: DataLoader(numbers(1000), batch_size=5)  # type: ignore[assignment]
    takes = run(Own(DataLoader(numbers(), batch_size=4)), module)
    assert seen(takes.taken[0]) == list(range(1000, 1010))

    class Data(TinyData):
        def calibration_dataloader(self) -> Any:
            return DataLoader(numbers(2000), batch_size=5)

    assert seen(run(Data()).taken[0]) == list(range(2000, 2010))


@pytest.mark.parametrize("combine", [dict, lambda loaders: CombinedLoader(loaders, "max_size_cycle")])
def test_several_loaders_are_read_together(combine: Any) -> None:
    loaders = {"a": DataLoader(numbers(), batch_size=4), "b": DataLoader(numbers(100), batch_size=2)}

    takes = run(Own(combine(loaders)))
    assert [set(batch) for batch in takes.taken[0]] == [{"a", "b"}] * 2
    assert seen([batch["b"] for batch in takes.taken[0]]) == list(range(100, 104))


def test_fewer_batches_than_asked_for_are_all_that_there_are() -> None:
    takes = run(Own(DataLoader(numbers(), batch_size=4)), count=99)
    assert len(takes.taken[0]) == 5
