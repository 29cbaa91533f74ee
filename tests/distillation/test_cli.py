"""YAML without code: teacher, student, adapters, three losses and one of the user's own by `class_path`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_compress import FeatureCosine, FeatureMSE, SoftTarget
from lightning_compress.distillation import DistillationModule
from tests.distillation.nets import LogitL1, bits, loader

# The module can validate; these runs have nothing to validate on.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")

ROOM = "lightning_compress"
CONFIG = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
    "model": {
        "class_path": f"{ROOM}.DistillationModule",
        "init_args": {
            "student": {"class_path": "tests.distillation.nets.ConvNet"},
            "teacher": {"class_path": "tests.distillation.nets.ConvNet", "init_args": {"width": 8, "stride": 2}},
            "task_loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}},
            "task_weight": 0.5,
            "losses": [
                {"class_path": f"{ROOM}.SoftTarget", "init_args": {"temperature": 4.0}},
                {
                    "class_path": f"{ROOM}.FeatureCosine",
                    "init_args": {"student_layer": "head", "teacher_layer": "head", "weight": 0.1},
                },
                {
                    "class_path": f"{ROOM}.FeatureMSE",
                    "init_args": {"student_layer": "features.0", "teacher_layer": "features.0"},
                },
                {"class_path": "tests.distillation.nets.LogitL1", "init_args": {"weight": 0.1}},
            ],
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}},
            "scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
        },
    },
}


def command(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> LightningCLI:
    Path("config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["run"])
    arguments = ["--config", "config.yaml"]
    return LightningCLI(run=False, args=arguments, save_config_callback=None, seed_everything_default=1, **kwargs)


@pytest.mark.parametrize("subclass_mode", [True, False])
def test_a_yaml_file_trains_and_its_checkpoint_loads_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, subclass_mode: bool
) -> None:
    if subclass_mode:
        cli = command(CONFIG, monkeypatch, model_class=DistillationModule, subclass_mode_model=True)
    else:
        config = {**CONFIG, "model": CONFIG["model"]["init_args"]}
        cli = command(config, monkeypatch, model_class=DistillationModule)
    module = cli.model
    assert list(module.losses.values()) == [
        SoftTarget(temperature=4.0),
        FeatureCosine("head", "head", weight=0.1),
        FeatureMSE("features.0", "features.0"),
        LogitL1(weight=0.1),
    ]
    assert module.task_loss.label_smoothing == 0.1
    cli.trainer.fit(module, loader())
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)
    (path,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["hyper_parameters"]["task_weight"] == 0.5 and "teacher" not in saved["hyper_parameters"]
    again = DistillationModule.load_from_checkpoint(path)  # the student is rebuilt from its class path
    assert again.teacher is None and list(again.losses) == list(module.losses)
    for name, value in bits(again).items():
        assert torch.equal(value, module.state_dict()[name])


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("weight", -1.0)])
def test_a_bad_value_in_yaml_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: float
) -> None:
    loss = {"class_path": f"{ROOM}.SoftTarget", "init_args": {name: value}}
    arguments = {**CONFIG["model"]["init_args"], "losses": [loss]}
    with pytest.raises((SystemExit, ValueError)) as error:
        command({**CONFIG, "model": arguments}, monkeypatch, model_class=DistillationModule)
    assert f"Received: {name}={value}" in capsys.readouterr().err + str(error.value)
