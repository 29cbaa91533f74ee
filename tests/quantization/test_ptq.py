"""`PostTrainingQuantization`: the test metric is that of the int8 model, and the float model comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_compress import CompressionError, PostTrainingQuantization, StaticInt8, Targets, quantize
from lightning_compress.modules.routing import form_of
from tests.quantization.prepared import At, int8_layers
from tests.quantization.test_qat_fits import attributes
from tests.support.data import TinyData, keyword_loader
from tests.support.modules import Classifier, KeywordClassifier, ZooModule, quiet_trainer
from tests.support.oracles import assert_same_state, hooks, same_random_state, snapshot
from tests.support.zoo import ZOO, Row, row

SCHEMES = ["int8_static", "int8_dynamic"]


def trained() -> Classifier:
    torch.manual_seed(0)
    module = Classifier()
    quiet_trainer(max_epochs=2).fit(module, TinyData())
    return module


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_test_metric_is_that_of_the_int8_model(scheme: str, inference_mode: bool) -> None:
    # Q26, against `quantize` by hand on the same batches.
    module, data = trained(), TinyData()
    data.setup("fit")
    by_hand = quantize(module, scheme, calibration=list(data.train_dataloader()))
    expected = quiet_trainer().test(by_hand, data, verbose=False)
    floats = quiet_trainer().test(module, data, verbose=False)
    trainer = quiet_trainer(inference_mode=inference_mode, callbacks=[PostTrainingQuantization(scheme)])
    metrics = trainer.test(module, data, verbose=False)
    assert metrics == expected
    assert metrics[0]["test_loss"] != floats[0]["test_loss"]
    assert metrics[0]["test_loss"] == pytest.approx(floats[0]["test_loss"], rel=0.1)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_float_model_comes_back_bit_identical_and_trains(scheme: str, inference_mode: bool) -> None:
    # Q18, Q19, promise 7.
    module, data = trained(), TinyData()
    module.body.eval()
    before, had, mode = snapshot(module), attributes(module), modes(module)
    identities = [id(parameter) for parameter in module.parameters()]
    trainer = quiet_trainer(inference_mode=inference_mode, callbacks=[PostTrainingQuantization(scheme)])
    for _ in range(2):
        trainer.test(module, data, verbose=False)
        trainer.predict(module, data)
        assert_same_state(before, module)
        assert list(module.state_dict()) == list(before)
        assert attributes(module) == had
        assert modes(module) == mode
        assert hooks(module) == []
        assert [id(parameter) for parameter in module.parameters()] == identities
    module.train()
    trainer.fit(module, data)
    assert not any(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())
    assert not any(tensor.is_inference() for tensor in module.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("row", ZOO, ids=str)
def test_over_the_zoo(row: Row) -> None:
    scheme = SCHEMES[ZOO.index(row) % 2]  # `quantize` has been tried with each on each
    module = ZooModule(row)
    before, had = snapshot(module), attributes(module)
    floats = quiet_trainer().test(module, verbose=False)[0]["test_loss"]
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization(scheme)])
    loss = trainer.test(module, verbose=False)[0]["test_loss"]
    assert loss == pytest.approx(floats, rel=0.2, abs=0.02)
    assert loss != floats
    assert_same_state(before, module)
    assert attributes(module) == had
    trainer.fit(module)


def test_while_testing_the_model_is_int8() -> None:
    seen: list[int] = []
    watch = At(on_test_batch_start=lambda t, m: seen.append(len(int8_layers(m))))
    module = trained()
    quiet_trainer(callbacks=[PostTrainingQuantization(), watch]).test(module, TinyData(), verbose=False)
    assert set(seen) == {2}


def test_predictions_are_the_int8_models() -> None:
    module, data = trained(), TinyData()
    data.setup("fit")
    expected = quantize(module, calibration=list(data.train_dataloader())).eval()(data.test.tensors[0])
    predictions = quiet_trainer(callbacks=[PostTrainingQuantization()]).predict(module, data)
    torch.testing.assert_close(torch.cat(predictions), expected)  # in other batches


def test_fit_and_its_validation_are_left_alone() -> None:
    module, plain = Classifier(), Classifier()
    plain.load_state_dict(module.state_dict())
    quiet_trainer(max_epochs=2, callbacks=[PostTrainingQuantization()]).fit(module, TinyData())
    quiet_trainer(max_epochs=2).fit(plain, TinyData())
    assert_same_state(module, plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_is_quantized_as_it_is_loaded(scheme: str, tmp_path: Path) -> None:
    # Q4.
    torch.manual_seed(0)
    module, data = Classifier(), TinyData()
    trainer = quiet_trainer(max_epochs=2, callbacks=[PostTrainingQuantization(scheme)])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    expected = trainer.test(module, data, verbose=False)
    fresh = Classifier()
    ours = quiet_trainer(callbacks=[PostTrainingQuantization(scheme)])
    assert ours.test(fresh, data, ckpt_path=tmp_path / "float.ckpt", verbose=False, weights_only=True) == expected
    assert_same_state(module, fresh)


# What it is calibrated on.


class Watched(TinyData):
    """Notes each sample that is read, and under which name."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def watched(self, name: str) -> DataLoader[Any]:
        source, read = getattr(self, name), self.read

        class Reads:
            def __len__(self) -> int:
                return len(source)

            def __getitem__(self, index: int) -> Any:
                read.append(name)
                return source[index]

        return DataLoader(Reads(), batch_size=8)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        return self.watched("train")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.watched("test")


class WithCalibration(Watched):
    def calibration_dataloader(self) -> DataLoader[Any]:
        self.calibration = self.train
        return self.watched("calibration")


class NotesCalibration(Callback):
    def __init__(self, data: Watched) -> None:
        self.data, self.before = data, []

    def on_test_start(self, *_: Any) -> None:
        self.before = list(self.data.read)


@pytest.mark.parametrize(("make", "name"), [(Watched, "train"), (WithCalibration, "calibration")])
def test_calibrates_on_the_calibration_loader_else_on_the_train_loader_and_never_on_test_data(
    make: Any, name: str
) -> None:
    data = make()
    notes = NotesCalibration(data)
    quiet_trainer(callbacks=[PostTrainingQuantization(calibration_batches=3), notes]).test(
        trained(), data, verbose=False
    )
    assert set(notes.before) - {"test"} == {name}
    assert 24 <= notes.before.count(name) <= 32
    assert notes.before.count("test") <= 8 and data.read.count("test") == 50


def test_only_the_calibration_data_decides_the_ranges() -> None:
    class Loud(TinyData):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            self.test.tensors = (self.test.tensors[0] * 100, self.test.tensors[1])

    scales: list[list[float]] = []

    def note(trainer: Any, module: Any) -> None:
        form: Any = form_of(module)
        scales.append([rounding.scale for rounding in form.roundings])

    for data in (TinyData(), Loud()):
        quiet_trainer(callbacks=[PostTrainingQuantization(), At(on_test_end=note)]).test(trained(), data, verbose=False)
    assert scales[0] == scales[1] and scales[0]


def test_the_modules_own_loaders_serve_too() -> None:
    class Own(Classifier):
        def calibration_dataloader(self) -> Any:
            data = TinyData()
            data.setup("fit")
            return data.train_dataloader()

    data = TinyData()
    data.setup("test")
    trainer = quiet_trainer(callbacks=[PostTrainingQuantization()])
    assert "test_acc" in trainer.test(Own(), data.test_dataloader(), verbose=False)[0]
    assert "test_loss" in trainer.test(ZooModule(row("mlp")), verbose=False)[0]


def test_bare_loaders_are_an_error_that_names_calibration_dataloader() -> None:
    data, module = TinyData(), trained()
    data.setup("test")
    before, had = snapshot(module), attributes(module)
    with pytest.raises(
        CompressionError,
        match="must be there.*bare loaders.*datamodule.*calibration_dataloader = lambda: train_loader",
    ):
        quiet_trainer(callbacks=[PostTrainingQuantization()]).test(module, data.test_dataloader(), verbose=False)
    assert_same_state(before, module)
    assert attributes(module) == had
    quiet_trainer(callbacks=[PostTrainingQuantization("int8_dynamic")]).test(
        module, data.test_dataloader(), verbose=False
    )


@pytest.mark.parametrize("where", ["loader", "forward", "empty", "targets", "nothing"])
def test_an_error_during_calibration_leaves_the_module_float_and_bit_identical(where: str) -> None:
    class Data(TinyData):
        def train_dataloader(self) -> Any:
            if where == "empty":
                return []
            batches = list(super().train_dataloader())
            if where == "loader":

                def fails() -> Any:
                    yield from batches[:2]
                    raise RuntimeError("the loader fails")

                return fails()
            if where == "forward":
                batches[2] = [torch.randn(8, 15), batches[2][1]]
            return batches

    module = trained()
    before, had = snapshot(module), attributes(module)
    targets = {"targets": Targets(include=["nope"]), "nothing": Targets(exclude=["*"])}.get(where)
    with pytest.raises((RuntimeError, CompressionError)):
        quiet_trainer(callbacks=[PostTrainingQuantization(targets=targets)]).test(module, Data(), verbose=False)
    assert_same_state(before, module)
    assert attributes(module) == had
    assert hooks(module) == []
    module.train()  # Lightning leaves a module as it was when the error came
    quiet_trainer().fit(module, TinyData())


def test_an_error_in_the_test_leaves_the_module_float() -> None:
    class Breaks(Classifier):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise ValueError("in the test")

    module = Breaks()
    before, had = snapshot(module), attributes(module)
    with pytest.raises(ValueError, match="in the test"):
        quiet_trainer(callbacks=[PostTrainingQuantization()]).test(module, TinyData(), verbose=False)
    assert_same_state(before, module)
    assert attributes(module) == had


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_drawn_from_the_global_generators(scheme: str) -> None:
    class Data(TinyData):
        def loader(self, dataset: Any) -> DataLoader[Any]:
            return DataLoader(dataset, batch_size=8, generator=torch.Generator())

    module, data = trained(), Data()
    with same_random_state():
        quiet_trainer(callbacks=[PostTrainingQuantization(scheme)]).test(module, data, verbose=False)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_keyword_batches(scheme: str) -> None:
    # Q2.
    class Data(TinyData):
        def loader(self, dataset: Any) -> Any:
            return keyword_loader()

    module = KeywordClassifier()
    floats = quiet_trainer().test(module, keyword_loader(), verbose=False)[0]["test_loss"]
    loss = quiet_trainer(callbacks=[PostTrainingQuantization(scheme)]).test(module, Data(), verbose=False)[0][
        "test_loss"
    ]
    assert loss == pytest.approx(floats, rel=0.05) and loss != floats


def test_a_module_whose_forward_is_not_what_its_steps_call() -> None:
    class Steps(Classifier):
        def forward(self, *_: Any) -> Tensor:
            raise RuntimeError("never called")

        def logits(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.body(x)).relu())

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", F.cross_entropy(self.logits(batch[0]), batch[1]))

        def calibration_step(self, batch: Any) -> Tensor:
            return self.logits(batch[0])

    seen: list[int] = []
    watch = At(on_test_batch_start=lambda t, m: seen.append(len(int8_layers(m))))
    quiet_trainer(callbacks=[PostTrainingQuantization(), watch]).test(Steps(), TinyData(), verbose=False)
    assert set(seen) == {2}


def test_targets_and_a_scheme_object() -> None:
    seen: list[int] = []
    watch = At(on_test_batch_start=lambda t, m: seen.append(len(int8_layers(m))))
    ptq = PostTrainingQuantization(StaticInt8(observer="histogram"), targets=Targets(exclude=["head"]))
    quiet_trainer(callbacks=[ptq, watch]).test(trained(), TinyData(), verbose=False)
    assert set(seen) == {1}
    assert any("`head` stays float: excluded" in note for note in ptq.report_notes())


def test_memory_is_constant_over_many_tests() -> None:
    import gc

    gc.collect()
    gc.freeze()  # what is alive already isn't looked at
    module, trainer, counts = trained(), quiet_trainer(callbacks=[PostTrainingQuantization()]), []
    for _ in range(4):
        trainer.test(module, TinyData(), verbose=False)
        gc.collect()
        counts.append(sum(1 for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)))
    gc.unfreeze()
    assert counts[1] == counts[2] == counts[3]
