"""`PostTrainingQuantization` with `compare` and `keep`, its `quantized_model`, and what it reads to calibrate."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler
from torchmetrics import Accuracy, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassPrecision, MulticlassRecall

from lightning_compress import CompressionError, PostTrainingQuantization, load_compressed
from tests.quantization.test_qat import At, attributes, int8_layers
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, same_random_state, snapshot

SCHEMES = ["int8_static", "int8_dynamic", "int8_weight_only"]


class Blank(Classifier):
    """A classifier without steps that log, for the tests to add them."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise NotImplementedError

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Plain(Blank):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.loss(batch))  # the batch size is found out
        self.log("largest", self(batch[0]).amax(), reduce_fx="max", batch_size=len(batch[0]))


class Dict(Blank):
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        loss = self.loss(batch)
        self.log_dict({"loss": loss, "double": 2 * loss}, batch_size=len(batch[0]))
        self.log("stepwise", loss, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss}

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("from outputs", outputs["loss"], batch_size=len(batch[0]))


class Metrics(Blank):
    """Metric objects: by themselves, in a collection, computed by hand, and not even registered."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = Accuracy("multiclass", num_classes=4)
        self.several = MetricCollection([MulticlassPrecision(4), MulticlassRecall(4)], prefix="of/")
        self.by_hand = MeanMetric()
        self.aside = [MeanMetric()]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.accuracy(logits, batch[1])
        self.several(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log_dict(self.several, on_step=False, on_epoch=True)
        self.by_hand.update(self.loss(batch))
        self.aside[0].update(logits.amax(1).mean())

    def on_test_epoch_end(self) -> None:
        for name, metric in (("by hand", self.by_hand), ("aside", self.aside[0])):
            self.log(name, metric.compute())
            metric.reset()


class Collects(Blank):
    """The idiom of Lightning 2: outputs are collected, and logged when the epoch ends."""

    def on_test_start(self) -> None:
        self.started = getattr(self, "started", 0) + 1

    def on_test_epoch_start(self) -> None:
        self.seen: list[Tensor] = []

    def on_test_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.index = batch_idx

    def test_step(self, batch: Any) -> None:
        self.seen.append(self(batch[0]) * (self.index + 1))

    def on_test_epoch_end(self) -> None:
        self.log("mean", torch.cat(self.seen).mean())
        self.log_dict({"deviation": torch.cat(self.seen).std(), "batches": float(len(self.seen))})


class Draws(Blank):
    """Noise in the test step, as in diffusion."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0] + torch.randn_like(batch[0])
        self.log("loss", self.loss((x, batch[1])))


class InPlace(Blank):
    """Normalizes its batch in place."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(2).add_(1)
        self.log("loss", self.loss(batch))
        batch.pop()


def fitted(kind: type[L.LightningModule]) -> Any:
    torch.manual_seed(0)
    module = kind()
    quiet_trainer(max_epochs=2).fit(module, TinyData())
    return module


def metrics_of(module: Any, data: Any = None, trainer: Any = None, **options: Any) -> dict[str, float]:
    """The metrics of one test, of all loaders together."""
    trainer = trainer or quiet_trainer(callbacks=[PostTrainingQuantization(**options)] if options else [])
    torch.manual_seed(1)
    metrics = trainer.test(module, data or TinyData(), verbose=False)
    return {name: value for one in metrics for name, value in one.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [Plain, Dict, Metrics, Collects, Draws, InPlace])
def test_one_test_logs_both_to_the_last_bit(kind: Any, scheme: str) -> None:
    # Q26: float as a test without us logs it, int8 as a test without `compare` does.
    module = fitted(kind)
    before = snapshot(module)
    floats = metrics_of(module)
    int8 = metrics_of(module, scheme=scheme)
    both = metrics_of(module, scheme=scheme, compare=True)
    assert floats and floats != int8
    assert both == {**int8, **{f"float/{name}": value for name, value in floats.items()}}
    assert_same_state(before, module)
    assert metrics_of(module) == floats


@pytest.mark.parametrize("inference_mode", [True, False])
def test_compare_from_a_checkpoint(inference_mode: bool, tmp_path: Path) -> None:
    module, other = fitted(Metrics), Metrics()
    trainer = quiet_trainer()
    trainer.fit(module, TinyData())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    floats = metrics_of(module)
    ptq = PostTrainingQuantization(compare=True)
    ours = quiet_trainer(inference_mode=inference_mode, callbacks=[ptq])
    [metrics] = ours.test(other, TinyData(), ckpt_path=tmp_path / "float.ckpt", weights_only=True, verbose=False)
    assert {name.removeprefix("float/"): metrics[name] for name in metrics if name.startswith("float/")} == floats
    assert metrics["by hand"] != metrics["float/by hand"]
    ours.fit(other, TinyData())  # Q18
    assert not any(tensor.is_inference() for tensor in other.state_dict(keep_vars=True).values())


class Several(TinyData):
    """Two test loaders, of which the second is louder and shorter."""

    def test_dataloader(self) -> Any:
        loud = [(x * 3, y) for x, y in zip(*self.val.tensors, strict=True)][:20]
        return [self.loader(self.test), DataLoader(loud, batch_size=8)]  # type: ignore[arg-type]


class ByLoader(Blank):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = nn.ModuleList(MeanMetric() for _ in range(2))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.log(f"named_{dataloader_idx}", loss, add_dataloader_idx=False)
        self.metrics[dataloader_idx](loss)
        self.log(f"metric_{dataloader_idx}", self.metrics[dataloader_idx], add_dataloader_idx=False)


class ByLoaderRequired(Blank):
    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        self.log("loss", self.loss(batch) + dataloader_idx)


class AnyArguments(Blank):
    def test_step(self, *args: Any) -> None:
        self.log("loss", self.loss(args[0]) + 10 * len(args))


@pytest.mark.parametrize("kind", [ByLoader, ByLoaderRequired, AnyArguments])
def test_several_test_loaders_keep_their_names(kind: Any) -> None:
    module = fitted(kind)
    floats, int8 = metrics_of(module, Several()), metrics_of(module, Several(), scheme="int8_static")
    assert {"loss/dataloader_idx_0", "loss/dataloader_idx_1"} <= floats.keys()
    both = metrics_of(module, Several(), scheme="int8_static", compare=True)
    assert both == {**int8, **{f"float/{name}": value for name, value in floats.items()}}


@pytest.mark.parametrize("kind", [ByLoader, AnyArguments])
def test_one_loader_gives_no_loader_index(kind: Any) -> None:
    module = fitted(kind)
    floats = metrics_of(module)
    both = metrics_of(module, scheme="int8_static", compare=True)
    assert {name: both[f"float/{name}"] for name in floats} == floats


def test_loaders_that_are_read_side_by_side() -> None:
    class Beside(TinyData):
        def test_dataloader(self) -> Any:
            return CombinedLoader({"a": self.loader(self.test), "b": self.loader(self.val)}, "min_size")

    class Pairs(Blank):
        def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = -1) -> None:
            self.log("loss", self.loss(batch["a"]) - self.loss(batch["b"]) + dataloader_idx, batch_size=8)

    module = fitted(Pairs)
    floats, int8 = metrics_of(module, Beside()), metrics_of(module, Beside(), scheme="int8_static")
    both = metrics_of(module, Beside(), scheme="int8_static", compare=True)
    assert both == {**int8, **{f"float/{name}": value for name, value in floats.items()}}


class Batch:
    """A batch of a class of the user's own, as graph libraries have them."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: Any) -> Batch:
        return Batch(self.x.to(device), self.y.to(device))


class OwnBatches(TinyData):
    def loader(self, dataset: Any) -> Any:
        batches = [Batch(*(part.clone() for part in batch)) for batch in super().loader(dataset)]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class TakesOwnBatches(Blank):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss((batch.x, batch.y))

    def calibration_step(self, batch: Any) -> Any:
        return self(batch.x)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        batch.x.mul_(2)
        self.log("loss", self.loss((batch.x, batch.y)), batch_size=len(batch.y))


def test_a_batch_of_a_class_of_ones_own_is_not_changed_for_the_other_model() -> None:
    torch.manual_seed(0)
    module = TakesOwnBatches()
    quiet_trainer(limit_val_batches=0).fit(module, OwnBatches())
    floats, int8 = metrics_of(module, OwnBatches()), metrics_of(module, OwnBatches(), scheme="int8_static")
    both = metrics_of(module, OwnBatches(), scheme="int8_static", compare=True)
    assert both == {**int8, **{f"float/{name}": value for name, value in floats.items()}}


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_what_a_step_draws_from_other_generators_is_the_same_for_both(draw: Any) -> None:
    class DrawsElsewhere(Blank):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch) + draw())

    module, found = fitted(DrawsElsewhere), []
    for options in ({}, {"scheme": "int8_static"}, {"scheme": "int8_static", "compare": True}):
        random.seed(0)
        np.random.seed(0)
        found.append(metrics_of(module, **options))
    floats, int8, both = found
    assert both == {**int8, **{f"float/{name}": value for name, value in floats.items()}}


@pytest.mark.xfail(strict=True, reason="the twin's `log` takes the place of the module's own method")
def test_a_log_method_of_the_modules_own_names_both_alike() -> None:
    class Prefixes(Blank):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
            super().log(f"stage/{name}", *args, **kwargs)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", self.loss(batch))

    module = fitted(Prefixes)
    floats = metrics_of(module)
    assert set(floats) == {"stage/loss"}
    both = metrics_of(module, scheme="int8_static", compare=True)
    assert both["float/stage/loss"] == floats["stage/loss"]


def test_the_float_model_runs_its_hooks_once_each_and_leaves_the_modules_alone() -> None:
    module = fitted(Collects)
    metrics_of(module, scheme="int8_static", compare=True)
    assert module.started == 1
    assert len(module.seen) == 7  # batches of the int8 model alone


def test_an_error_in_the_float_models_step_leaves_the_module_float() -> None:
    class Breaks(Blank):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise ValueError("in the test")

    module = Breaks()
    before, had = snapshot(module), attributes(module)
    with pytest.raises(ValueError, match="in the test"):
        metrics_of(module, scheme="int8_static", compare=True)
    assert_same_state(before, module)
    assert attributes(module) == had


def test_compare_over_two_tests_of_one_callback() -> None:
    module = fitted(Metrics)
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(compare=True)])
    first = metrics_of(module, trainer=trainer)
    trainer.fit(module, TinyData())
    floats, second = metrics_of(module), metrics_of(module, trainer=trainer)
    assert first != second
    assert {name: second[f"float/{name}"] for name in floats} == floats


def test_compare_where_the_module_is_int8_already_is_not_left_out_silently() -> None:
    module = fitted(Plain)
    floats = metrics_of(module)
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(keep=True, compare=True)])
    first, second = metrics_of(module, trainer=trainer), metrics_of(module, trainer=trainer)
    assert {name: first[f"float/{name}"] for name in floats} == floats
    assert second == first


# keep


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kept_int8_it_is_saved_loaded_and_trained_on_in_float(scheme: str, tmp_path: Path) -> None:
    # Q6, Q23.
    module, data = fitted(Metrics), TinyData()
    before, floats = snapshot(module), metrics_of(module)
    trainer = quiet_trainer(max_epochs=3, callbacks=[PostTrainingQuantization(scheme, keep=True)])
    metrics = metrics_of(module, trainer=trainer)
    assert metrics != floats
    assert "body.weight" not in module.state_dict() or module.state_dict()["body.weight"].dtype == torch.int8
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
    assert int8 is not None and int8 is not module and type(int8) is Plain
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


_ELSEWHERE = pytest.mark.xfail(strict=True, reason="only torch's generator is seeded and put back to calibrate")


@pytest.mark.parametrize(
    "shuffle", ["torch", pytest.param("random", marks=_ELSEWHERE), pytest.param("numpy", marks=_ELSEWHERE)]
)
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
