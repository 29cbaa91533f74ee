"""`ExportModel`: what is written when, and that a test measures the file."""

from __future__ import annotations

import copy
import importlib.util
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy

from lightning_compress import (
    CompressionReport,
    DistillationModule,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    SoftTarget,
)
from lightning_compress.errors import CompressionError, MissingExtraError
from lightning_compress.export.callback import ExportModel
from lightning_compress.export.sidecar import read_sidecar
from tests.support.data import TinyData
from tests.support.ddp import run_ranks
from tests.support.fits import fit
from tests.support.modules import Classifier, quiet_trainer
from tests.support.onnx_sessions import open_session
from tests.support.oracles import assert_same_state, hooks, snapshot

PATH = Path("out", "model.onnx")


def quick(path: Any = PATH, **options: Any) -> ExportModel:
    """Without the proof, which has tests of its own."""
    return ExportModel(str(path), **{"verify": False, **options})


def metrics_of(module: Any, *callbacks: Callback, **options: Any) -> dict[str, float]:
    [metrics] = quiet_trainer(callbacks=list(callbacks), **options).test(module, TinyData(), verbose=False)
    return metrics


def logits_of(path: Path, x: Tensor) -> Tensor:
    """By onnxruntime alone."""
    session = open_session(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def data_of_the_test() -> tuple[Tensor, Tensor]:
    data = TinyData()
    data.setup("test")
    return data.test.tensors


class Nets(Classifier):
    """The layers lie in a network, which the step calls; beside it lie a metric and a loss."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Sequential(self.flatten, self.body, self.norm, nn.ReLU(), self.head)
        del self.flatten, self.body, self.norm, self.head
        self.net = layers
        self.accuracy = Accuracy("multiclass", num_classes=4)
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.accuracy(logits, batch[1])
        self.log("test_acc", self.accuracy, on_epoch=True)
        self.log("test_loss", self.loss(logits, batch[1]))


@dataclass
class Written:
    """A trained module, its file, and the callback that wrote it."""

    module: Nets
    path: Path
    callback: ExportModel


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    path = tmp_path_factory.mktemp("written") / "new" / "model.onnx"
    callback = ExportModel(str(path))
    _, module = fit(callback, module=Nets())
    return Written(module.eval(), path, callback)


def test_the_file_of_what_the_step_calls_stands_when_the_fit_ends(written: Written) -> None:
    x, _ = data_of_the_test()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(written.path, x), written.module.net(x))
    assert written.callback.exported is not None
    facts = read_sidecar(written.path)
    assert facts["inputs"][0]["shape"] == ["batch", 16]
    assert facts["parity"]["samples"] > 0
    assert sorted(file.name for file in written.path.parent.iterdir()) == ["model.onnx", "model.onnx.json"]


def test_a_test_logs_the_files_metrics_beside_the_models(written: Written) -> None:
    module = copy.deepcopy(written.module)
    before = snapshot(module)
    alone, both = metrics_of(module), metrics_of(module, written.callback)
    x, y = data_of_the_test()
    logits = logits_of(written.path, x)
    assert both["onnxruntime/test_acc"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
    assert both["onnxruntime/test_loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-4)
    assert {name: both[name] for name in alone} == alone and len(both) == 2 * len(alone)
    assert_same_state(before, module)
    assert hooks(module) == [] and vars(module).keys() == vars(written.module).keys()


def test_every_batch_runs_in_the_file(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    run, sizes = onnxruntime.InferenceSession.run, list[int]()

    def watched(self: Any, names: Any, arrays: Any) -> Any:
        sizes.extend(len(array) for array in arrays.values())
        return [np.zeros_like(output) for output in run(self, names, arrays)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", watched)
    both = metrics_of(written.module, written.callback)
    assert sizes == [8] * 6 + [2]
    assert both["onnxruntime/test_loss"] == pytest.approx(np.log(4))
    assert abs(both["test_loss"] - np.log(4)) > 0.1


def test_a_file_that_is_there_is_tested_by_another_process(written: Written, caplog: Any) -> None:
    again = metrics_of(written.module, ExportModel(str(written.path)))
    assert again == metrics_of(written.module, written.callback)
    assert "onnxruntime/test_acc" not in metrics_of(written.module, ExportModel(str(written.path), test=False))
    absent = quick("no.onnx")
    assert "onnxruntime/test_acc" not in metrics_of(written.module, absent)
    assert absent.report_notes()[0].startswith("no.onnx isn't there: its metrics aren't measured")


def test_metrics_of_other_weights_are_not_logged(written: Written, caplog: pytest.LogCaptureFixture) -> None:
    module = copy.deepcopy(written.module)
    callback = ExportModel(str(written.path))
    with torch.no_grad():
        module.net[1].bias[0].add_(1e-3)
    with caplog.at_level(logging.INFO):
        assert metrics_of(module, callback).keys() == {"test_acc", "test_loss"}
    assert "holds other weights than those that are tested: its metrics aren't measured" in caplog.text
    assert callback.report_notes()[0] in caplog.text
    assert "onnxruntime/test_acc" in metrics_of(written.module, callback) and callback.report_notes() == []


def test_a_file_that_was_changed_is_an_error(written: Written, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name).write_bytes((written.path.parent / name).read_bytes())
    (tmp_path / "model.onnx").write_bytes(b"other")
    with pytest.raises(CompressionError, match="It was changed since"):
        metrics_of(written.module, ExportModel(str(tmp_path / "model.onnx")))


@pytest.mark.parametrize("first", [True, False], ids=["export first", "export last"])
def test_what_trained_for_int8_is_written_in_int8(first: bool) -> None:
    export, qat = ExportModel(str(PATH)), QuantizationAwareTraining()
    _, module = fit(*([export, qat] if first else [qat, export]))
    assert export.exported is not None and set(export.exported.int8) == {"body", "head"}
    both = metrics_of(module, export)
    assert both["onnxruntime/test_loss"] == pytest.approx(both["test_loss"], rel=1e-3)
    assert both["onnxruntime/test_loss"] != both["test_loss"]


@pytest.mark.parametrize("first", [True, False], ids=["export first", "export last"])
def test_what_a_test_quantizes_is_written_and_tested_by_it(first: bool) -> None:
    export, ptq = quick(), PostTrainingQuantization(compare=True)
    callbacks: list[Callback] = [export, ptq] if first else [ptq, export]
    trainer, module = fit(*callbacks)
    assert not PATH.exists() and export.exported is None
    before = snapshot(module)
    [both] = trainer.test(module, TinyData(), verbose=False)
    assert export.exported is not None and set(export.exported.int8) == {"body", "head"}
    names = {"test_acc", "test_loss"}
    assert both.keys() == names | {f"{prefix}/{name}" for prefix in ("float", "onnxruntime") for name in names}
    assert both["onnxruntime/test_loss"] == pytest.approx(both["test_loss"], rel=1e-3)
    assert both["onnxruntime/test_loss"] != both["float/test_loss"]
    assert_same_state(before, module)
    assert hooks(module) == []


def test_of_a_module_that_distils_the_student_is_written() -> None:
    layers = [nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 4)) for hidden in (4, 1024)]
    module = DistillationModule(*layers, losses=[SoftTarget()], optimizer=torch.optim.SGD)
    export = quick()
    fit(export, module=module)
    x, _ = data_of_the_test()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(PATH, x), layers[0](x))
    assert PATH.stat().st_size < 10_000 < sum(parameter.nbytes for parameter in layers[1].parameters())
    assert "onnxruntime/test_acc" in metrics_of(module, export)


def test_the_average_is_written() -> None:
    averaging = EMAWeightAveraging(decay=0.9)
    _, module = fit(averaging, export := quick())
    x, _ = data_of_the_test()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(PATH, x), module.eval()(x))
    plain = fit()[1]
    assert not plain.head.weight.equal(module.head.weight)
    assert "onnxruntime/test_acc" in metrics_of(module, export)


@dataclass
class Output:
    logits: Tensor
    features: Tensor | None = None


class Answers(nn.Module):
    """Gives an object of a class of its own, and has an attribute that steps read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Linear(16, 4)
        self.smoothing = 0.1

    def forward(self, x: Tensor, *, scale: Tensor) -> Output:
        return Output(self.layers(x) * scale[:, None])


class UsesAnswers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = Answers()
        del self.body, self.norm, self.head

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        output = self.net(x, scale=torch.ones(len(x)))
        return F.cross_entropy(output.logits, y, label_smoothing=self.net.smoothing)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.training_step(batch, batch_idx))


def test_outputs_are_of_the_models_classes_and_attributes_stay() -> None:
    trainer, module = fit(quick(), module=UsesAnswers())
    [both] = trainer.test(module, TinyData(), verbose=False)
    assert both["onnxruntime/loss"] == pytest.approx(both["loss"], rel=1e-4)


# What can't be measured is refused at the first batch of the fit, and nothing is left.


class CallsInside(Nets):
    """Calibrates by itself, tests by its network."""

    def calibration_step(self, batch: Any) -> Tensor:
        return self(batch[0])


class CallsTwo(Nets):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        features = self.net[0:4](batch[0])
        self.log("loss", self.loss(self.net[4](features), batch[1]))


class CallsPartToo(Nets):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.net[1](batch[0])


class ReadsPart(Nets):
    def __init__(self) -> None:
        super().__init__()
        self.tied = Tied(self.net)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.tied(batch[0])


class Tied(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.nets = (net,)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.nets[0][1].weight) * self.scale


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            CallsInside,
            {},
            "a `test_step` that calls `net`, and never the module itself. Name in `module` what it calls",
        ),
        (CallsTwo, {}, r"`module` must be named where test_step calls `net.\{1-2,4\}`. Received: module=''"),
        (CallsTwo, {"module": "net"}, "`module` must be called by test_step. Received: module='net'. It calls `net"),
        (CallsPartToo, {}, "`module` must be named where test_step calls `net`, `net.1`"),
        (CallsPartToo, {"module": "net"}, "that calls `net.1` from outside of `net` too"),
        (ReadsPart, {"module": "net"}, "that reads the parameters of `net.1` outside of `net`"),
        (Nets, {"module": "nett"}, "`module` must be the path of a module. Received: module='nett'. Nearest: net"),
    ],
)
def test_a_file_that_no_test_would_measure_is_refused_before_training(kind: Any, options: Any, words: str) -> None:
    module = kind()
    before = snapshot(module)
    with pytest.raises(CompressionError, match=words):
        fit(quick(**options), module=module)
    assert_same_state(before, module)
    assert hooks(module) == [] and not PATH.parent.exists()


def test_without_a_test_it_may_be_any_module_that_is_called() -> None:
    fit(quick(module="net.1", test=False), module=CallsPartToo())
    assert read_sidecar(PATH)["outputs"] and PATH.exists()


class SkipsLater(Nets):
    """Calls the network in the first batch of a test alone; in the second a part of it, or nothing."""

    part = False

    def test_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 or self.part:
            super().test_step(batch, batch_idx)
        if batch_idx and self.part:
            self.net[1](batch[0])


@pytest.mark.parametrize(
    ("part", "words"), [(True, "calls `net.1` from outside of `net` too, in"), (False, "never calls `net` in batch 1")]
)
def test_a_later_batch_that_does_not_run_in_the_file_ends_the_test(written: Written, part: bool, words: str) -> None:
    module = SkipsLater()
    module.load_state_dict(written.module.state_dict())
    module.part = part
    with pytest.raises(CompressionError, match=words):
        metrics_of(module, ExportModel(str(written.path)))
    assert hooks(module) == [] and vars(module).keys() == vars(SkipsLater()).keys() | {"part"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"path": "model.txt"}, "`path` must end in .onnx"),
        ({"path": "model.onnx", "target": "onnx_runtime"}, "Nearest: onnxruntime"),
        ({"path": "model.onnx", "target": "executorch"}, "`path` must end in .pte"),
        ({"path": "model.onnx", "calibration_batches": 0}, "`calibration_batches` must be at least 1"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        ExportModel(**options)


def test_what_can_be_known_before_training_is(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_folder / "file").touch()
    (own_folder / "folder.onnx").mkdir()
    with pytest.raises(CompressionError, match="`path` must be a file that can be written.*It is a folder"):
        fit(quick("folder.onnx"))
    with pytest.raises(CompressionError, match="Nothing can be written into"):
        fit(quick("file/model.onnx"))
    with pytest.raises(CompressionError, match="`path` must differ from that of another ExportModel"):
        fit(quick(), quick(own_folder / PATH, target="openvino"))
    with pytest.raises(CompressionError, match="`test` must be False for all but one ExportModel of a runtime"):
        fit(quick(), quick("other.onnx"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "lightning-compress\[onnx\]"'):
        fit(quick())


def test_fast_dev_run_leaves_the_file_that_is_there(caplog: pytest.LogCaptureFixture) -> None:
    PATH.parent.mkdir()
    PATH.write_text("trained for hours")
    with caplog.at_level(logging.INFO):
        fit(quick(test=False), fast_dev_run=True)
    assert PATH.read_text() == "trained for hours" and "can be written; with fast_dev_run it isn't" in caplog.text


class Breaks(Callback):
    def on_train_epoch_end(self, *_: Any) -> None:
        raise RuntimeError("stopped")


def test_what_was_interrupted_writes_nothing_and_what_goes_on_does(tmp_path: Path) -> None:
    export = quick()
    with pytest.raises(RuntimeError, match="stopped"):
        fit(export, Breaks())
    assert not PATH.parent.exists()
    quiet_trainer(callbacks=[export]).validate(Classifier(), TinyData(), verbose=False)
    assert not PATH.parent.exists()
    fit(export, max_epochs=1)
    first = read_sidecar(PATH)["weights_sha256"]
    _, module = fit(export)
    assert read_sidecar(PATH)["weights_sha256"] != first
    for twin in (copy.deepcopy(export), pickle.loads(pickle.dumps(export))):
        assert metrics_of(module, twin) == metrics_of(module, export)


class Branches(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Sorts(Classifier):
    """Has an operator without a translation, which shows when the file is written."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.special.bessel_j0(x))


def test_what_cannot_be_traced_is_refused_before_training() -> None:
    before = snapshot(module := Branches())
    with pytest.raises(CompressionError, match="its control flow depends on the values of tensors"):
        fit(quick(), module=module)
    assert_same_state(before, module)
    assert not PATH.parent.exists() and hooks(module) == []


def test_what_fails_at_the_end_leaves_no_file() -> None:
    module = Sorts()
    with pytest.raises(CompressionError, match="`model` must be made of operators that ONNX has"):
        fit(quick(), module=module)
    assert list(PATH.parent.iterdir()) == [] and hooks(module) == []


class Lengths(TinyData):
    """Sequences whose length differs from batch to batch."""

    def loader(self, dataset: Any) -> Any:
        batches = super().loader(dataset)
        return DataLoader([(x[:, : 16 - number % 3], y) for number, (x, y) in enumerate(batches)], batch_size=None)


class Pools(Nets):
    """Takes sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Pooled()


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack([x.mean(1), x.square().mean(1)], 1))


@pytest.mark.parametrize("data", [TinyData(), Lengths()])
def test_dimensions_that_vary_are_named_or_found(data: TinyData) -> None:
    named = None if isinstance(data, Lengths) else {"x": [1]}
    trainer, module = fit(ExportModel(str(PATH), dynamic=named), module=Pools(), data=data)
    assert read_sidecar(PATH)["inputs"][0]["shape"] == ["batch", "x_1"]
    [both] = trainer.test(module, Lengths(), verbose=False)
    assert both["onnxruntime/test_loss"] == pytest.approx(both["test_loss"], rel=1e-4)


def test_a_part_of_a_model_in_mixed_precision_is_written_in_float32() -> None:
    class Parts(Nets):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(self.net(self.first(batch[0])), batch[1]))

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16)

    trainer, module = fit(quick(module="net"), module=Parts(), precision="bf16-mixed")
    [both] = trainer.test(module, TinyData(), verbose=False)
    assert both["onnxruntime/test_loss"] == pytest.approx(both["test_loss"], rel=0.02)


def test_a_file_for_batches_of_a_fixed_size_is_measured_on_all() -> None:
    trainer, module = fit(ExportModel(str(PATH), dynamic_batch=False))
    assert read_sidecar(PATH)["batch"] == 8
    [both] = trainer.test(module, TinyData(), verbose=False)
    assert both["onnxruntime/test_loss"] == pytest.approx(both["test_loss"], rel=1e-4)


def test_loaders_without_a_datamodule() -> None:
    data = TinyData()
    data.setup("fit")
    export, ptq = quick(test=False), PostTrainingQuantization("int8_dynamic")
    quiet_trainer(callbacks=[export]).fit(module := Classifier(), data.train_dataloader(), data.val_dataloader())
    assert read_sidecar(PATH)["inputs"][0]["shape"] == ["batch", 16]
    PATH.unlink()
    trainer = quiet_trainer(callbacks=[export, ptq])
    trainer.test(module, data.test_dataloader(), verbose=False)
    assert PATH.exists()


def test_the_report_has_a_row_for_the_file() -> None:
    export = quick()
    report = CompressionReport("report", picture=True, max_seconds=0.05, batch_sizes=(1, 4))
    trainer, module = fit(report, export, module=Nets())
    [metrics] = trainer.test(module, TinyData(), verbose=False)
    assert report.comparison is not None
    assert [row.name for row in report.comparison.rows] == ["before", "after", "model.onnx"]
    row, after = report.comparison["model.onnx"], report.comparison["after"]
    assert row.measurement.size_bytes == PATH.stat().st_size
    assert row.metrics == {name: metrics[f"onnxruntime/{name}"] for name in ("test_acc", "test_loss")}
    assert row.origins["test_acc"] == "test of the file" and not any("/" in name for name in after.metrics)
    assert (row.measurement.parameters, row.measurement.macs) == (after.measurement.parameters, after.measurement.macs)
    assert set(row.speedup) == {1, 4}
    assert {timed.turns for timed in row.measurement.latency} == {timed.turns for timed in after.measurement.latency}
    assert "| model.onnx |" in Path("report", "report.md").read_text()


def fit_and_test_by_ddp(path: str) -> dict[str, float]:
    data, module = TinyData(48), Classifier()
    trainer = quiet_trainer(callbacks=[quick(path)], devices=2, strategy="ddp")
    trainer.fit(module, data)
    [metrics] = trainer.test(module, data, verbose=False)
    return {name: float(value) for name, value in metrics.items()}


@pytest.mark.slow
def test_of_two_processes_one_writes_and_both_measure(tmp_path: Path) -> None:
    for metrics in run_ranks(fit_and_test_by_ddp, str(tmp_path / "model.onnx")):
        assert metrics["onnxruntime/test_loss"] == pytest.approx(metrics["test_loss"], rel=1e-4)
