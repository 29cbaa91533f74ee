"""What models from outside bring that the zoo's rows don't: found by use, each once a failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from torch import Tensor, nn

from lightning_compress import (
    CompressionError,
    PostTrainingQuantization,
    QLoRA,
    QuantizationAwareTraining,
    ScheduledPruning,
    load_compressed,
    quantize,
    save_compressed,
)
from lightning_compress.quantization.convert import record_of
from tests.support.architectures import UNet
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.zoo import row


def test_an_int8_kernel_that_computes_something_else_is_not_used() -> None:
    # torch's int8 kernels of ConvTranspose2d give noise, with no word; which of them, and when, depends on the CPU.
    unet, x = UNet().eval(), torch.randn(4, 3, 8, 8)
    int8 = quantize(unet, calibration=[x]).eval()
    assert F.cosine_similarity(unet(x).flatten(), int8(x).flatten(), dim=0) > 0.98
    assert "right on every CPU" in (record_of(int8) or {})["floats"]["up"]


class Keeps(Classifier):
    """Keeps computed tensors, as Lightning's own examples do."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.losses.append(super().training_step(batch, batch_idx))
        return self.losses[-1]


def test_a_module_that_keeps_computed_tensors_can_be_tested_and_quantized(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer = quiet_trainer(
        callbacks=[ScheduledPruning(sparsity=0.5), QuantizationAwareTraining(), save], enable_checkpointing=True
    )
    module = Keeps()
    module.losses.append((module.head.weight * 2).sum())
    trainer.fit(module, TinyData())
    trainer.test(module, TinyData(), ckpt_path=tmp_path / "last.ckpt", verbose=False)


class Matrix(nn.Module):
    """A layer of the user's own, with a matrix in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("int8_static", "`matmul` takes it as a weight, for which there is no static int8 kernel"),
        ("int8_dynamic", "no int8_dynamic kernel for Matrix"),
    ],
)
def test_layers_of_the_users_own_are_listed_as_float(scheme: str, reason: str) -> None:
    model = nn.Sequential(Matrix(), nn.ReLU(), nn.Linear(16, 4))
    int8 = quantize(model, scheme, calibration=[torch.randn(8, 16)])
    assert (record_of(int8) or {})["floats"]["0"] == reason


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic"])
def test_a_head_that_is_tied_to_an_embedding_stays_float(scheme: str) -> None:
    # A second, int8 copy of the matrix would make the model larger.
    model, (ids,) = row("tied").build(), row("tied").inputs()[0]
    floats = (record_of(quantize(model, scheme, calibration=[(ids,)])) or {})["floats"]
    assert any("tied to" in reason for reason in floats.values())


class BuiltLate(L.LightningModule):
    """Builds itself in `configure_model`, and sizes its head by what the checkpoint says."""

    classes = 4

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, self.classes))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.net[2] = nn.Linear(16, len(checkpoint["state_dict"]["net.2.bias"]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_load_compressed_runs_the_modules_own_hooks(tmp_path: Path) -> None:
    module = BuiltLate()
    module.classes = 6
    save = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [QuantizationAwareTraining(convert=False), save]
    quiet_trainer(callbacks=callbacks, enable_checkpointing=True).fit(module, TinyData())
    again = load_compressed(str(tmp_path / "last.ckpt"), BuiltLate())
    x = torch.randn(4, 16)
    assert torch.equal(again.eval()(x), module.eval()(x))


def test_the_rich_progress_bar_is_none_of_our_callbacks(tmp_path: Path) -> None:
    callbacks = [ScheduledPruning(sparsity=0.5), RichProgressBar(), ModelCheckpoint(tmp_path)]
    options = {"enable_progress_bar": True, "enable_checkpointing": True}
    quiet_trainer(callbacks=callbacks, **options).fit(Classifier(), TinyData())


def test_two_pruning_callbacks_log_under_names_of_their_own() -> None:
    from lightning_compress import Targets

    callbacks = [
        ScheduledPruning(sparsity=value, targets=Targets([name])) for name, value in (("body", 0.5), ("head", 0.9))
    ]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=2)
    trainer.fit(Classifier(), TinyData())
    assert trainer.callback_metrics["sparsity_0"] == pytest.approx(0.5)
    assert trainer.callback_metrics["sparsity_1"] == pytest.approx(0.9, abs=0.01)


class Generated(nn.Module):
    """Calls a layer with a weight that isn't the layer's, as hypernetworks and meta-learning do."""

    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.layer, self.other, self.head, self.own = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4), own
        self.factor = nn.Parameter(torch.tensor(-2.0))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight if self.own else self.layer.weight * self.factor
        hidden: Tensor = torch.func.functional_call(self.layer, {"weight": weight}, (x,))
        return self.head((self.other(x) + hidden).relu())


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int8_weight_only", "nf4", "gptq"])
def test_a_layer_that_is_called_with_parameters_of_others_stays_float(scheme: str, own: bool, tmp_path: Path) -> None:
    model, x, path = Generated(own).eval(), torch.randn(32, 16), str(tmp_path / "model.ckpt")
    parameters = dict(model.named_parameters())
    quantized = quantize(model, scheme, calibration=[x])
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert F.cosine_similarity(quantized(x).flatten(), model(x).flatten(), dim=0) > 0.98
    record = record_of(quantized) or {}
    if scheme == "int8_static":  # which follows how the weight is computed
        assert [unit["path"] for unit in record["units"]] == [""] and not record["floats"]
    else:
        assert "functional_call" in record["floats"]["layer"]
        assert {"other"} <= {layer["path"] for layer in record["layers"]}
    save_compressed(quantized, path)
    assert torch.equal(load_compressed(path, Generated(own).eval())(x), quantized(x))


def test_parameters_of_others_that_no_batch_told_of_are_an_error() -> None:
    quantized = quantize(Generated().eval(), "int8_weight_only")
    with pytest.raises(CompressionError, match="others in the place of"):
        quantized(torch.randn(2, 16))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.unused.weight).relu())


def test_the_last_layer_is_quantized_where_no_other_is_called() -> None:
    record = record_of(quantize(Unused().eval(), "gptq", calibration=[torch.randn(32, 16)])) or {}
    assert [layer["path"] for layer in record["layers"]] == ["head"]


class PartlyScripted(Classifier):
    """Has a child that is TorchScript: it takes no hooks, and its tensors aren't in dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
        self.first, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scripted(self.first(x)))


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # deprecated, and in use
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of copying scripted modules
@pytest.mark.parametrize(
    "callback",
    [
        lambda: PostTrainingQuantization(keep=True),
        lambda: PostTrainingQuantization("int8_dynamic", keep=True),
        QuantizationAwareTraining,
        QLoRA,
    ],
)
def test_a_scripted_child_stays_float_and_is_named(callback: Any, tmp_path: Path) -> None:
    module, path = PartlyScripted(), tmp_path / "model.ckpt"
    trainer = quiet_trainer(callbacks=[callback()])
    if isinstance(callback(), PostTrainingQuantization):
        trainer.test(module, TinyData(), verbose=False)
    else:
        trainer.fit(module, TinyData())
    record = record_of(module) or {}
    assert "RecursiveScriptModule" in record["floats"]["scripted.0"]
    assert record["units"] or record["layers"]
    trainer.save_checkpoint(path, weights_only=True)
    x = torch.randn(8, 16)
    assert torch.equal(load_compressed(str(path), PartlyScripted().eval())(x), module.eval()(x))


class Mixes(Classifier):
    """Computes with the sum of two layers' weights, of which torch's traced form fails where it is converted."""

    def __init__(self) -> None:
        super().__init__(hidden=16)
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight * 0.99 + self.first.weight * 0.01
        return self.head((F.linear(x, weight) + self.first(x)).relu())


def test_what_torch_fx_prints_of_a_graph_that_fails_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    quiet_trainer(callbacks=[QuantizationAwareTraining()]).fit(Mixes(), TinyData())
    assert "Call using an FX-traced Module" not in capfd.readouterr().err


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 4


class TiedToScaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = Scaled(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(ids)).relu())


class _Shell(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = TiedToScaled()

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)


class ByBatch(nn.Module):
    """Multiplies by a layer's weight in ways that have no int8 kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.body.weight.unsqueeze(0).expand(x.shape[0], -1, -1)
        return self.head(torch.baddbmm(torch.bmm(x, weight), x, weight).relu())


def test_what_stays_float_inside_of_a_whole_module_is_named_with_its_reason() -> None:
    tied = quantize(_Shell().eval(), calibration=[torch.arange(20).reshape(4, 5)])
    floats = (record_of(tied) or {})["floats"]
    assert floats.keys() == {"net.embedding", "net.head"}
    assert "`net.embedding`" in floats["net.head"]
    by_batch = quantize(ByBatch().eval(), calibration=[torch.randn(4, 5, 16)])
    assert (record_of(by_batch) or {})["floats"] == {"body": "no static int8 kernel for this Linear as it is used here"}
