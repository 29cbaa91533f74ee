from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_compress import (
    ChannelPruning,
    CompressionReport,
    Cosine,
    ExportModel,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    ScheduledPruning,
    Targets,
    WeightOnly,
    Window,
)
from lightning_compress.report.run_settings import run_settings
from lightning_compress.settings import given_arguments, plain
from tests.report.models import Classifier
from tests.support.modules import quiet_trainer

ROOM, LINEAR = "lightning_compress", "torch.nn.modules.linear.Linear"


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (ScheduledPruning(sparsity=0.9), {"sparsity": 0.9}),
        (
            ScheduledPruning("magnitude", sparsity=0.9, schedule=Cosine()),
            {"method": "magnitude", "sparsity": 0.9, "schedule": {"class_path": f"{ROOM}.Cosine"}},
        ),
        (ChannelPruning(macs=0.5), {"macs": 0.5}),
        (
            QuantizationAwareTraining(targets=Targets(exclude=["head"]), window=Window(0.25, 0.5)),
            {
                "targets": {"class_path": f"{ROOM}.Targets", "init_args": {"exclude": ["head"]}},
                "window": {"class_path": f"{ROOM}.Window", "init_args": {"start": 0.25, "end": 0.5}},
            },
        ),
        (
            PostTrainingQuantization(WeightOnly(4)),
            {"scheme": {"class_path": f"{ROOM}.WeightOnly", "init_args": {"bits": 4}}},
        ),
        (ExportModel("model.onnx"), {"path": "model.onnx"}),
        (CompressionReport(), {}),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else "",
)
def test_callbacks_know_with_what_they_were_made(callback: Any, said: dict[str, Any]) -> None:
    assert callback.report_settings() == said
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert copied.report_settings() == callback.report_settings()


def test_a_module_is_its_class_and_is_not_held() -> None:
    class Holder:
        def __init__(self, teacher: nn.Module, rate: float = 0.5) -> None: ...

    assert given_arguments(Holder, (nn.Linear(2, 2),), {}) == {"teacher": {"class_path": LINEAR}}
    assert given_arguments(Holder, (), {"unknown": 1}) == {}, "the constructor says what is wrong"


@pytest.mark.parametrize(
    ("value", "said"),
    [(Path("a/b"), "a/b"), ({"x": (1, None)}, {"x": [1, None]}), (nn.Linear, LINEAR)],
)
def test_values_become_plain(value: Any, said: Any) -> None:
    assert plain(value) == said


def test_settings_of_a_run_are_yaml_of_which_the_callbacks_can_be_made_again(tmp_path: Path) -> None:
    callbacks = [ScheduledPruning(sparsity=0.5), QuantizationAwareTraining(window=Window(0.5, 1.0))]
    run = quiet_trainer(
        max_epochs=3, accumulate_grad_batches=2, precision="bf16-mixed", callbacks=callbacks, default_root_dir=tmp_path
    )
    run.strategy._lightning_module = Classifier()
    text = run_settings(run, callbacks)
    found = yaml.safe_load(text)
    assert set(found["trainer"]) == {"max_epochs", "accumulate_grad_batches", "precision", "accelerator", "callbacks"}
    again = quiet_trainer(**{name: value for name, value in found["trainer"].items() if name != "callbacks"})
    assert (again.max_epochs, again.accumulate_grad_batches, again.precision) == (3, 2, "bf16-mixed")
    assert found["model"] == {"class_path": "tests.report.models.Classifier"}
    parser = ArgumentParser()
    parser.add_argument("--callbacks", type=list[Callback])
    made = parser.instantiate(parser.parse_object({"callbacks": found["trainer"]["callbacks"]})).callbacks
    assert [(type(one), one.report_settings()) for one in made] == [
        (ScheduledPruning, {"sparsity": 0.5}),
        (QuantizationAwareTraining, callbacks[1].report_settings()),
    ]
    assert made[1].window == callbacks[1].window
