"""Every public class from a configuration file or from arguments, by its full and by its short name."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_compress import (
    DistillationModule,
    Linear,
    Polynomial,
    QuantizationAwareTraining,
    ScheduledPruning,
    StaticInt8,
    Targets,
    Window,
)
from lightning_compress.cli import main
from tests.support.oracles import count_zeros

TRAINER = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
DATA = {"class_path": "tests.support.data.TinyData"}
CLASSIFIER = {"class_path": "tests.support.modules.Classifier"}
PRUNING = {
    "method": "l1_unstructured",
    "sparsity": 0.9,
    "scope": "global",
    "targets": {"include": ["*"], "exclude": ["head"]},
    "schedule": {"class_path": "Polynomial", "init_args": {"power": 3}},
    "window": {"start": 0.1, "end": 0.75},
}
DISTILLATION = {
    "student": {"class_path": "tests.contracts.test_yaml.Net", "init_args": {"width": 8}},
    "teacher": {"class_path": "tests.contracts.test_yaml.Net", "init_args": {"width": 32}},
    "task_weight": 0.5,
    "losses": [
        {"class_path": "SoftTarget", "init_args": {"temperature": 4.0, "weight": 0.5}},
        {"class_path": "FeatureMSE", "init_args": {"student_layer": "body", "teacher_layer": "body"}},
    ],
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
}


class Net(torch.nn.Module):
    """A student or a teacher, by its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = torch.nn.Linear(16, width)
        self.head = torch.nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).relu())


class Seen(Callback):
    """Remembers the last run, for the test to look at."""

    last: tuple[Trainer, LightningModule]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Seen.last = trainer, pl_module


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])


def configure(callbacks: list[Any], model: dict[str, Any] = CLASSIFIER) -> list[str]:
    """Write config.yaml into the current folder and give the arguments that read it."""
    trainer = {**TRAINER, "callbacks": [*callbacks, {"class_path": "tests.contracts.test_yaml.Seen"}]}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": trainer, "model": model, "data": DATA}))
    return ["--config=config.yaml"]


def only(kind: type[Callback]) -> Any:
    (found,) = [callback for callback in Seen.last[0].callbacks if isinstance(callback, kind)]
    return found


@pytest.mark.parametrize("name", ["lightning_compress.ScheduledPruning", "ScheduledPruning"])
def test_pruning(name: str) -> None:
    main(["fit", *configure([{"class_path": name, "init_args": PRUNING}])])
    pruning, module = only(ScheduledPruning), Seen.last[1]
    assert pruning.schedule == Polynomial(power=3)
    assert pruning.window == Window(start=0.1, end=0.75, every_n_steps=10)
    assert pruning.targets == Targets(include=["*"], exclude=["head"])
    assert count_zeros([module.body.weight]) == (round(0.9 * 512), 512)
    assert count_zeros([module.head.weight])[0] == 0


def test_pruning_by_arguments_alone() -> None:
    arguments = ["--trainer.callbacks+=ScheduledPruning", "--trainer.callbacks.sparsity=0.5"]
    main(["fit", *configure([]), *arguments, "--trainer.callbacks.schedule=Linear"])
    assert only(ScheduledPruning).schedule == Linear()
    assert count_zeros([Seen.last[1].body.weight, Seen.last[1].head.weight]) == (320, 640)


def test_distillation() -> None:
    main(["fit", *configure([], {"class_path": "DistillationModule", "init_args": DISTILLATION})])
    module = Seen.last[1]
    assert isinstance(module, DistillationModule)
    assert isinstance(module.optimizers().optimizer, torch.optim.SGD)
    assert not [name for name in module.state_dict() if "teacher" in name]


def test_distillation_tests_its_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    config = configure([], {"class_path": "DistillationModule", "init_args": DISTILLATION})
    main(["fit", *config])
    (checkpoint,) = Path("checkpoints").glob("*.ckpt")
    capsys.readouterr()
    main(["test", *config, f"--ckpt_path={checkpoint}"])
    assert "test_acc" in capsys.readouterr().out


@pytest.mark.parametrize("scheme", ["int8_static", {"class_path": "StaticInt8"}], ids=["name", "object"])
def test_quantization_aware_training(scheme: Any) -> None:
    callback = {"class_path": "QuantizationAwareTraining", "init_args": {"scheme": scheme, "window": {"start": 0.5}}}
    main(["fit", *configure([callback])])
    quantization = only(QuantizationAwareTraining)
    assert isinstance(quantization.scheme, StaticInt8)
    assert quantization.window == Window(start=0.5)


def test_quantization_after_training(capsys: pytest.CaptureFixture[str]) -> None:
    callback = {"class_path": "PostTrainingQuantization", "init_args": {"calibration_batches": 4}}
    main(["test", *configure([callback])])
    assert "test_acc" in capsys.readouterr().out


def test_report(own_folder: Path) -> None:
    report = {"class_path": "CompressionReport", "init_args": {"directory": "report", "max_seconds": 0.2}}
    main(["fit", *configure([report])])
    assert (own_folder / "report" / "report.json").is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "l1_unstructurd"}, r"`method` must .*'l1_unstructurd'.*l1_unstructured"),
        ({"sparsity": 1.5}, r"`sparsity` must lie in \[0, 1\)\. Received: sparsity=1\.5\."),
        ({"targets": {"include": ["bady"]}}, r"bady.*Nearest: body"),
        ({"window": {"start": 0.5, "end": 0.2}}, "`end` must"),
        ({"schedule": {"class_path": "Polynomial", "init_args": {"power": -1}}}, "`power` must"),
        ({"scope": "globl"}, "globl"),
        ({"sparsit": 0.5}, "sparsit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_told(wrong: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure([{"class_path": "ScheduledPruning", "init_args": {**PRUNING, **wrong}}])
    with pytest.raises(SystemExit) as stop:
        main(["fit", *config])
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_is_printed_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *args, "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    pruning = {"class_path": "lightning_compress.ScheduledPruning", "init_args": PRUNING}
    text = printed(*configure([pruning], {"class_path": "DistillationModule", "init_args": DISTILLATION}))
    read = yaml.safe_load(text)
    assert read["model"]["class_path"] == "lightning_compress.DistillationModule"
    assert [loss["class_path"] for loss in read["model"]["init_args"]["losses"]] == [
        "lightning_compress.SoftTarget",
        "lightning_compress.FeatureMSE",
    ]
    assert read["trainer"]["callbacks"][0]["init_args"]["schedule"]["class_path"] == "lightning_compress.Polynomial"
    Path("config.yaml").write_text(text)
    assert printed("--config=config.yaml") == text
