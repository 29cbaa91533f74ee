"""`PostTrainingQuantization` with `compare`: one test logs the metrics of both models."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_compress import PostTrainingQuantization
from tests.quantization.logging_modules import SCHEMES, Blank, Draws, Metrics, Plain, fitted, metrics_of
from tests.quantization.test_qat_fits import attributes
from tests.support.data import TinyData
from tests.support.modules import quiet_trainer
from tests.support.oracles import assert_same_state, snapshot


class Dict(Blank):
    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        loss = self.loss(batch)
        self.log_dict({"loss": loss, "double": 2 * loss}, batch_size=len(batch[0]))
        self.log("stepwise", loss, on_step=True, on_epoch=True, prog_bar=True)
        return {"loss": loss}

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("from outputs", outputs["loss"], batch_size=len(batch[0]))


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


class InPlace(Blank):
    """Normalizes its batch in place."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        batch[0].mul_(2).add_(1)
        self.log("loss", self.loss(batch))
        batch.pop()


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
