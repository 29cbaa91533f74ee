"""Where calibration batches come from, what comes before the step, and which stage asks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_compress import CompressionError, PostTrainingQuantization, quantize
from tests.quantization.test_ptq_data import BATCHES, Data, Normalises, Plain, X, Y, calibrated, expected, net
from tests.support.modules import quiet_trainer

INPUTS = [x for x, _ in BATCHES]


class Transfers(Data):
    """As where the device normalises."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] - 3, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 10, batch[1]]


class TransfersItself(Plain):
    calls = 0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls += 1
        return [(batch[0] - 3) * 10, batch[1]]


@pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`")
@pytest.mark.parametrize(("module", "data"), [(Plain, Transfers), (TransfersItself, Data)])
def test_batches_go_through_the_hooks_of_transfer(module: Any, data: Any) -> None:
    seen = calibrated(module(), data())
    assert torch.equal(seen.net(X), expected([(x - 3) * 10 for x in INPUTS]))
    assert getattr(seen, "calls", 4) == 4  # those of the test alone


class Pair(NamedTuple):
    features: Tensor
    labels: Tensor


@dataclass
class Sample:
    x: Tensor
    y: Tensor


class Mapped(Plain):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        x = batch[0] if isinstance(batch, tuple) else batch["x"] if isinstance(batch, dict) else batch.x
        self(10 * x)


@pytest.mark.parametrize("make", [Pair, Sample, lambda x, y: {"x": x, "y": y}], ids=["namedtuple", "dataclass", "dict"])
@pytest.mark.parametrize("by_step", [True, False], ids=["step", "forward"])
def test_batches_of_any_kind(make: Any, by_step: bool) -> None:
    batches = [make(x, y) for x, y in BATCHES]
    if by_step:
        assert torch.equal(calibrated(Mapped(), Data(batches)).net(X), expected([10 * x for x in INPUTS]))
    else:
        assert torch.equal(quantize(Plain().eval(), "int8_static", calibration=batches).net(X), expected(INPUTS))


class Inputs(Data):
    """Calibration batches hold inputs alone; those of the test don't."""

    def calibration_dataloader(self) -> Any:
        return DataLoader(INPUTS, batch_size=None)


def test_inputs_alone_are_not_taken_apart_by_a_step_that_wants_pairs() -> None:
    assert torch.equal(calibrated(Plain(), Inputs()).net(X), expected(INPUTS))  # `batch[0]` would be one sample


def test_a_step_that_takes_inputs_alone_is_used() -> None:
    class Predicts(Normalises):
        def predict_step(self, batch: Any) -> Tensor:
            return self((batch - 3) * 10)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise AssertionError

    class Only(Inputs):
        predict_dataloader = Inputs.calibration_dataloader

    assert torch.equal(calibrated(Predicts(), Only(), "predict").net(X), expected([(x - 3) * 10 for x in INPUTS]))


@pytest.mark.parametrize("fn", ["test", "validate", "predict"])
def test_the_step_of_the_running_stage_comes_first(fn: str) -> None:
    class Stages(Plain):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(2 * batch[0])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(3 * batch[0])

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(4 * batch[0])

    factor = {"test": 2, "validate": 3, "predict": 4}[fn]
    assert torch.equal(calibrated(Stages(), fn=fn).net(X), expected([factor * x for x in INPUTS]))


def test_a_module_with_a_step_for_calibration_is_fed_by_that_alone() -> None:
    class Calibrates(Normalises):
        def calibration_step(self, batch: Any) -> None:
            self.net(7 * batch[0])

    assert torch.equal(calibrated(Calibrates()).net(X), expected([7 * x for x in INPUTS]))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=None),
        BATCHES,
        CombinedLoader([DataLoader(INPUTS, batch_size=None), DataLoader(Y.split(8), batch_size=None)], "min_size"),
        [DataLoader(INPUTS, batch_size=None), DataLoader(Y.split(8), batch_size=None)],
    ],
    ids=["stream", "list of batches", "combined", "list of loaders"],
)
@pytest.mark.parametrize("owner", ["module", "datamodule"])
def test_any_loader_of_either_owner(loader: Any, owner: str) -> None:
    module, data = Normalises(), Data([(1e6 * x, y) for x, y in BATCHES])
    target: Any = module if owner == "module" else data
    target.calibration_dataloader = lambda: loader
    assert torch.equal(calibrated(module, data).net(X), expected([(x - 3) * 10 for x in INPUTS]))


def test_bare_loaders_with_the_line_that_the_refusal_names() -> None:
    module, loader = Plain(), DataLoader([(1e6 * x, y) for x, y in BATCHES], batch_size=None)
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization("int8_static", keep=True)])
    with pytest.raises(CompressionError, match="model.calibration_dataloader = lambda: train_loader"):
        trainer.test(module, loader, verbose=False)
    module.calibration_dataloader = lambda: BATCHES  # type: ignore[assignment]
    trainer.test(module, loader, verbose=False)
    assert torch.equal(module.eval().net(X), expected(INPUTS))


def test_a_loader_that_shuffles_by_a_generator_of_its_own_goes_on_undisturbed() -> None:
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(X, Y), 8, shuffle=True, generator=generator)
    module = Plain()
    module.calibration_dataloader = lambda: loader  # type: ignore[assignment]
    before = generator.get_state()
    calibrated(module)
    assert torch.equal(generator.get_state(), before)


class Validated(Normalises):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("loss", F.cross_entropy(self(self.fed(batch)), batch[1]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(self.fed(batch)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.parametrize("scheme", ["int4_weight_only", "int8_static"])
def test_validate_quantizes_as_test_does(scheme: str) -> None:
    def metrics(fn: str, *callbacks: Any) -> Any:
        return getattr(quiet_trainer(callbacks=list(callbacks)), fn)(Validated(), Data(), verbose=False)[0]

    def ptq(**options: Any) -> PostTrainingQuantization:
        return PostTrainingQuantization(scheme, overrides={"net.2": "int8_weight_only"}, **options)

    plain, validated = metrics("validate"), metrics("validate", ptq())
    assert validated == metrics("test", ptq()) != plain
    assert metrics("validate", ptq(compare=True)) == {**validated, "float/loss": plain["loss"]}


def test_the_validation_within_a_fit_sees_the_float_model() -> None:
    both: list[Any] = []
    for callbacks in ([], [PostTrainingQuantization("int8_static", compare=True)]):
        module = Validated()
        trainer = quiet_trainer(callbacks=callbacks)
        trainer.fit(module, Data())
        both.append(dict(trainer.callback_metrics))
        assert type(module.net[0]).__name__ == "Linear" and "forward" not in vars(module.net)
    assert both[0] == both[1] != {}


def test_gptq_sees_what_the_step_feeds() -> None:
    data = Data()
    ptq = PostTrainingQuantization("gptq", keep=True)
    module = Normalises()
    quiet_trainer(callbacks=[ptq]).test(module, data, verbose=False)
    inputs = [(x - 3) * 10 for x in INPUTS]
    assert torch.equal(module.eval().net(X), quantize(net().eval(), "gptq", calibration=inputs)(X))


def test_mixed_precision_calibrates_as_well() -> None:
    class TwoUnits(Normalises):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.net[2](self.net[0](self.fed(batch)).relu())

    module = calibrated(TwoUnits(), precision="bf16-mixed")
    inputs = torch.cat([(x - 3) * 10 for x in INPUTS])
    assert F.cosine_similarity(module.net(inputs).flatten(), net()(inputs).flatten(), 0) > 0.999
