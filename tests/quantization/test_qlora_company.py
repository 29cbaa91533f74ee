"""`QLoRA` beside other callbacks."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from torch import Tensor, nn

from lightning_compress import (
    NF4,
    CompressionReport,
    Distillation,
    DistillationModule,
    FeatureMSE,
    QLoRA,
    SoftTarget,
    Targets,
    merge_adapters,
    quantize,
)
from tests.quantization.lora.fits import BOTH, At, Held, LoadsInSetup, Net, adapted_layers, adapters, fit, mlp
from tests.support.data import TinyData
from tests.support.modules import Classifier
from tests.support.oracles import (
    assert_same_state,
    snapshot,
)

# Company.


@pytest.mark.parametrize("first", [True, False], ids=["QLoRA first", "QLoRA last"])
@pytest.mark.parametrize("feature", [False, True], ids=["logits", "features"])
def test_with_distillation(first: bool, feature: bool) -> None:
    torch.manual_seed(5)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 4))
    losses = [SoftTarget(), *([FeatureMSE("body", "1")] if feature else [])]
    callbacks = [QLoRA(rank=2), Distillation(teacher, losses, task_weight=0.5)]
    held = Held()
    before = snapshot(teacher)
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    module = Classifier()
    trainer, _ = fit(*(callbacks if first else reversed(callbacks)), note, module=module)
    del held
    assert_same_state(before, snapshot(teacher))
    assert adapted_layers(module).keys() == {"body"}
    after = snapshot(module)
    assert all(not torch.equal(start[name], after[name]) for name in BOTH)
    assert torch.equal(start["head.weight"], after["head.weight"])
    assert "train_soft_target" in trainer.callback_metrics
    trainer.test(module, TinyData(), verbose=False)


@pytest.mark.parametrize("wide", [pytest.param(False, id="same width"), pytest.param(True, id="an adapter")])
def test_with_a_distillation_module(wide: bool) -> None:
    torch.manual_seed(5)
    teacher = mlp(48 if wide else 24, 24, 4)
    module = DistillationModule(
        student=mlp(24, 24, 4),
        teacher=teacher,
        losses=[SoftTarget(weight=0.5), FeatureMSE(student_layer="0", teacher_layer="0", weight=0.5)],
        task_weight=0.5,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    )
    before = snapshot(teacher)
    qlora, start = QLoRA(rank=2), dict[str, Any]()
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    fit(qlora, note, module=module)
    assert list(adapted_layers(module)) == ["student.0", "student.2"]
    assert_same_state(before, snapshot(teacher))
    after = snapshot(module)
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    projection = {name for name in start if name.startswith("adapters.")}
    assert bool(projection) == wide
    # What only helps in training learns as it does without us.
    assert moved == projection | {f"student.{index}.lora_{name}" for index in (0, 2) for name in "AB"}
    qlora.merge()


def test_with_a_report(tmp_path: Any) -> None:
    qlora = QLoRA(rank=2)
    report = CompressionReport(directory=str(tmp_path / "report"), picture=False, max_seconds=0.01)
    trainer, module = fit(qlora, report)
    trainer.test(module, TinyData(), verbose=False)
    text = "".join(path.read_text() for path in (tmp_path / "report").rglob("*") if path.suffix in (".md", ".json"))
    assert "NF4" in text and "rank 2" in text
    assert any("76" in note.replace(",", "") or "96" in note for note in qlora.report_notes())


def test_the_notes_count_what_trains() -> None:
    qlora = QLoRA(rank=2)
    fit(qlora)
    # Adapters: 2 x 16 + 32 x 2. All: the Classifier, and those.
    total = sum(parameter.numel() for parameter in Classifier().parameters()) + 96
    assert f"96 of {total:,} parameters train" in qlora.report_notes()[0]


@pytest.mark.parametrize("buffers", [True, False], ids=["with buffers", "parameters alone"])
@pytest.mark.parametrize("first", [True, False], ids=["QLoRA first", "QLoRA last"])
def test_with_averages(first: bool, buffers: bool) -> None:
    module = Net(mlp(24, 24, 4))
    values: list[dict[str, Tensor]] = []
    ema = EMAWeightAveraging(decay=0.7, use_buffers=buffers)
    state: dict[str, Any] = {}

    def note(trainer: L.Trainer, pl_module: Any) -> None:
        values.append({name: value.detach().clone() for name, value in adapters(pl_module).items()})
        state.update(base={key: value for key, value in snapshot(pl_module).items() if "lora" not in key})

    callbacks: list[Callback] = [QLoRA(rank=2), ema]
    fit(*(callbacks if first else reversed(callbacks)), At(on_train_batch_end=note), module=module)
    expected = values[0]
    for later in values[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * later[name] for name in expected}
    for name, value in adapters(module).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    for key, value in snapshot(module).items():
        if "lora" not in key:  # averages of equal numbers round
            torch.testing.assert_close(value, state["base"][key], rtol=1e-5, atol=1e-7)
    merged = merge_adapters(module)
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(x), module.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [0.9, 0.95, 0.9999])
@pytest.mark.parametrize("first", [True, False], ids=["QLoRA first", "QLoRA last"])
def test_averages_never_touch_the_base(first: bool, decay: float) -> None:
    module = Net(mlp(24, 24, 4))
    start: dict[str, Any] = {}
    note = At(on_train_start=lambda t, m: start.update(snapshot(m)))
    callbacks: list[Callback] = [QLoRA(rank=2), EMAWeightAveraging(decay=decay)]
    fit(*(callbacks if first else reversed(callbacks)), note, module=module, max_epochs=3)
    after = snapshot(module)
    base = [key for key in start if key.startswith(("net.0.weight", "net.2.weight"))]
    assert len(base) == 8
    assert_same_state({key: start[key] for key in base}, {key: after[key] for key in base})


@pytest.mark.parametrize("first", [True, False], ids=["QLoRA first", "QLoRA last"])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step", "ignore:Swapping scheduler")
def test_with_stochastic_weight_averaging(first: bool) -> None:
    module = Net(mlp(24, 24, 4))
    starts: list[dict[str, Tensor]] = []
    base: dict[str, Any] = {}

    def note(trainer: L.Trainer, pl_module: Any) -> None:
        starts.append({name: value.detach().clone() for name, value in adapters(pl_module).items()})
        base.update({key: value for key, value in snapshot(pl_module).items() if "lora" not in key})

    callbacks: list[Callback] = [QLoRA(rank=2), StochasticWeightAveraging(0.01, swa_epoch_start=2)]
    fit(*(callbacks if first else reversed(callbacks)), At(on_train_epoch_start=note), module=module, max_epochs=4)
    # Lightning takes the weights at the start of each epoch from the second on, the last included.
    averaged = {name: torch.stack([start[name] for start in starts[1:4]]).mean(0) for name in starts[0]}
    for name, value in adapters(module).items():
        torch.testing.assert_close(value, averaged[name], rtol=1e-3, atol=1e-5)
    assert_same_state(base, {key: value for key, value in snapshot(module).items() if "lora" not in key})


def test_averages_of_a_module_that_loads_in_its_setup() -> None:
    for callbacks in ([QLoRA(rank=2), EMAWeightAveraging(decay=0.7)], [EMAWeightAveraging(decay=0.7), QLoRA(rank=2)]):
        module = LoadsInSetup()
        fit(*callbacks, module=module)
        wanted = LoadsInSetup()
        wanted.setup("fit")
        layer = adapted_layers(module)["body"]
        four_bits = quantize(wanted, NF4(), targets=Targets(include=["body"]))
        x = torch.randn(5, 16)
        with torch.no_grad():
            # Averages of equal numbers round.
            torch.testing.assert_close(F.linear(x, layer.weight(), layer.bias), four_bits.body(x), rtol=1e-5, atol=1e-6)
