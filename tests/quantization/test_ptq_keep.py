"""What stays quantized after a test, and what a test reads and shows."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler

from lightning_compress import CompressionError, PostTrainingQuantization, load_compressed
from tests.quantization.logging_modules import SCHEMES, Draws, Metrics, Plain, fitted, metrics_of
from tests.quantization.prepared import At, int8_layers
from tests.support.data import TinyData
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_same_state, same_random_state, snapshot

# keep


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kept_int8_it_is_saved_loaded_and_trained_on_in_float(scheme: str, tmp_path: Path) -> None:
    # Q6, Q23.
    module, data = fitted(Metrics), TinyData()
    before, floats = snapshot(module), metrics_of(module)
    trainer = quiet_trainer(max_epochs=3, callbacks=[PostTrainingQuantization(scheme, keep=True)])
    metrics = metrics_of(module, trainer=trainer)
    assert metrics != floats
    assert module.state_dict()["body.weight"].dtype in (torch.int8, torch.uint8)
    assert metrics_of(module) == metrics  # without any callback
    trainer.save_checkpoint(tmp_path / "int8.ckpt")
    loaded = load_compressed(str(tmp_path / "int8.ckpt"), Metrics())
    assert metrics_of(loaded) == metrics
    trainer.fit(module, data)
    assert list(module.state_dict()) == list(before)
    assert not any(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    plain = fitted(Metrics)
    quiet_trainer(max_epochs=3).fit(plain, data)
    assert_same_state(plain, module)


def test_kept_int8_it_is_not_trained_by_a_trainer_without_us() -> None:
    module = fitted(Plain)
    metrics_of(module, scheme="int8_static", keep=True)
    with pytest.raises((CompressionError, ValueError, RuntimeError)):
        quiet_trainer().fit(module, TinyData())


def test_kept_int8_it_predicts_what_it_predicted() -> None:
    module, data = fitted(Plain), TinyData()
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(keep=True)])
    first = trainer.predict(module, data)
    assert int8_layers(module)
    for got, wanted in zip(quiet_trainer().predict(module, data), first, strict=True):
        assert torch.equal(got, wanted)


# quantized_model


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_quantized_model_stays_what_it_was(scheme: str, keep: bool) -> None:
    module, data, x = fitted(Plain), TinyData(), torch.randn(5, 16)
    ptq = PostTrainingQuantization(scheme, keep=keep)
    assert ptq.quantized_model is None
    trainer = quiet_trainer(max_epochs=3, callbacks=[ptq])
    metrics = metrics_of(module, trainer=trainer)
    int8 = ptq.quantized_model
    assert int8 is not None and int8 is not module and isinstance(int8, Plain)
    expected, state = int8.eval()(x), snapshot(int8)
    trainer.fit(module, data)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(int8(x), expected)
    assert_same_state(state, int8)
    assert metrics_of(int8) == metrics
    metrics_of(module, trainer=trainer)
    assert ptq.quantized_model is not int8
    assert torch.equal(int8(x), expected)


def test_a_copy_or_pickle_of_the_callback_leaves_the_quantized_model_out() -> None:
    ptq = PostTrainingQuantization(calibration_batches=3, compare=True, overrides={"head": "int8_weight_only"})
    module = fitted(Plain)
    metrics = metrics_of(module, trainer=quiet_trainer(callbacks=[ptq]))
    assert ptq.quantized_model is not None
    for again in (copy.deepcopy(ptq), pickle.loads(pickle.dumps(ptq))):
        assert again.quantized_model is None
        assert metrics_of(module, trainer=quiet_trainer(callbacks=[again])) == metrics
    assert ptq.quantized_model is not None


# What it reads, and shows.


class Counted(TinyData):
    """Notes which samples were read to calibrate, and with which loader."""

    def __init__(self, shuffle: Any = "torch", workers: int = 0) -> None:
        super().__init__()
        self.read: list[int] = []
        self.shuffle = shuffle

    def train_dataloader(self) -> Any:
        source, read = self.train, self.read

        class Reads:
            def __len__(self) -> int:
                return len(source)

            def __getitem__(self, index: int) -> Any:
                read.append(index)
                return source[index]

        class Shuffles(Sampler[int]):
            def __init__(self, kind: str) -> None:
                self.kind = kind

            def __iter__(self) -> Iterator[int]:
                order = list(range(50))
                random.shuffle(order) if self.kind == "random" else np.random.shuffle(order)
                return iter(order)

        sampler = RandomSampler(Reads()) if self.shuffle == "torch" else Shuffles(self.shuffle)
        return DataLoader(Reads(), batch_size=8, sampler=sampler)  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [1, 3, 7, 99])
def test_calibration_reads_no_more_than_it_may(limit: int) -> None:
    data = Counted()
    metrics_of(fitted(Plain), data, scheme="int8_static", calibration_batches=limit)
    assert len(data.read) == min(50, 8 * limit)
    assert len(set(data.read)) == len(data.read)


def test_an_endless_loader_without_a_length() -> None:
    taken: list[int] = []

    class Endless(TinyData):
        def train_dataloader(self) -> Any:
            def stream() -> Any:
                while True:
                    taken.append(1)
                    yield torch.randn(8, 16), torch.zeros(8, dtype=torch.long)

            return stream()

    metrics_of(fitted(Plain), Endless(), scheme="int8_static", calibration_batches=5)
    assert len(taken) == 5


@pytest.mark.parametrize("shuffle", ["torch", "random", "numpy"])
def test_a_shuffling_loader_gives_the_same_order_in_every_run_and_draws_nothing(shuffle: str) -> None:
    module, orders = fitted(Plain), []
    for seed in (0, 1):
        data = Counted(shuffle)
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        trainer = quiet_trainer(callbacks=[PostTrainingQuantization(calibration_batches=3)], num_sanity_val_steps=0)
        with same_random_state():
            state = torch.get_rng_state()
            trainer.test(module, data, verbose=False)
            torch.set_rng_state(state)  # Lightning's own test loader draws from torch
        orders.append(data.read)
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0])


def test_calibration_leaves_torchs_generator_alone() -> None:
    at_start: list[Tensor] = []

    class Notes(PostTrainingQuantization):
        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            at_start.append(torch.get_rng_state())
            super().on_test_start(trainer, pl_module)
            at_start.append(torch.get_rng_state())

    for options in ({}, {"compare": True}, {"scheme": "int8_dynamic"}):
        metrics_of(fitted(Draws), Counted(), trainer=quiet_trainer(callbacks=[Notes(**options)]))
    assert len(at_start) == 6
    assert all(torch.equal(a, b) for a, b in zip(at_start[::2], at_start[1::2], strict=True))


@pytest.mark.parametrize("kind", ["list", "dict", "combined"])
def test_train_loaders_that_lightning_combines_are_combined_for_calibration_too(kind: str) -> None:
    class Combines(TinyData):
        def train_dataloader(self) -> Any:
            pair = [self.loader(self.train), self.loader(self.val)]
            named = dict(zip("ab", pair, strict=True))
            return {"list": pair, "dict": named, "combined": CombinedLoader(named, "min_size")}[kind]

    class Pairs(Plain):
        def calibration_step(self, batch: Any) -> Any:
            first, second = batch if kind == "list" else (batch["a"], batch["b"])
            return self(torch.cat([first[0], second[0]]))

    module = fitted(Plain)
    pairs = Pairs()
    pairs.load_state_dict(module.state_dict())
    metrics = metrics_of(pairs, Combines(), scheme="int8_static")
    assert metrics["loss"] == pytest.approx(metrics_of(module)["loss"], rel=0.1)


def test_batch_transfer_hooks_come_before_calibration() -> None:
    class Scales(TinyData):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 100, batch[1]]

    module = fitted(Plain)
    floats, int8 = metrics_of(module, Scales()), metrics_of(module, Scales(), scheme="int8_static")
    assert int8["largest"] == pytest.approx(floats["largest"], rel=0.1)


@pytest.mark.parametrize(
    ("bar", "shown"),
    [
        (lambda: {"enable_progress_bar": False}, False),
        (lambda: {"enable_progress_bar": True}, True),
        (lambda: {"enable_progress_bar": True, "callbacks": [TQDMProgressBar(refresh_rate=0)]}, False),
        (lambda: {"enable_progress_bar": True, "callbacks": [RichProgressBar()]}, True),
    ],
    ids=["none", "default", "disabled", "rich"],
)
def test_progress_of_calibration_is_shown_where_lightnings_is(
    bar: Any, shown: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    options = bar()
    callbacks = [PostTrainingQuantization(calibration_batches=3), *options.pop("callbacks", [])]
    module = fitted(Plain)
    capfd.readouterr()
    quiet_trainer(callbacks=callbacks, **options).test(module, TinyData(), verbose=False)
    assert ("Calibrating" in "".join(capfd.readouterr())) is shown


def test_while_it_compares_the_module_itself_is_int8() -> None:
    seen: list[int] = []
    watch = At(on_test_batch_end=lambda t, m: seen.append(len(int8_layers(m))))
    quiet_trainer(callbacks=[PostTrainingQuantization(compare=True), watch]).test(
        fitted(Plain), TinyData(), verbose=False
    )
    assert set(seen) == {2}
