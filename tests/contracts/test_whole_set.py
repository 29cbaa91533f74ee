"""All callbacks in one fit from a YAML file: the order of the list changes neither model, report nor exported file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_compress.cli import main
from tests.support.modules import Classifier
from tests.support.oracles import assert_same_state, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
    pytest.mark.filterwarnings("ignore:AccuracyGuard. what ChannelPruning takes at once can't be held"),
    pytest.mark.filterwarnings("ignore:CompressionReport"),
]
WHOLE: list[dict[str, Any]] = [
    {
        "class_path": "Distillation",
        "init_args": {
            "teacher": {"class_path": "tests.support.modules.Classifier", "init_args": {"hidden": 48}},
            "losses": [{"class_path": "SoftTarget"}],
            "task_weight": 0.5,
        },
    },
    {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.75}},
    {
        "class_path": "ChannelPruning",
        "init_args": {"channels": 0.5, "round_to": 1, "window": {"start": 0.1, "end": 0.3}},
    },
    {"class_path": "ScheduledPruning", "init_args": {"sparsity": 0.5, "window": {"start": 0.0, "end": 0.5}}},
    {"class_path": "QuantizationAwareTraining"},
    {
        "class_path": "AccuracyGuard",
        "init_args": {"monitor": "val_loss", "max_drop": 10.0, "mode": "min", "min_samples": 10},
    },
    {"class_path": "ExportModel", "init_args": {"path": "model.pt2"}},
    {"class_path": "CompressionReport", "init_args": {"directory": "report", "picture": False, "max_seconds": 0.01}},
]
MODELS = {"linear": "tests.support.modules.Classifier", "convolutions": "tests.contracts.test_whole_set.Residual"}


class Residual(Classifier):
    """Convolutions with a residual block, on the tiny data as images of 4 by 4."""

    def __init__(self) -> None:
        super().__init__()
        del self.body, self.norm
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(-1, 1, 4, 4))
        return self.head(torch.relu(x + self.block(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Seen(Callback):
    """Keeps what the last fit made."""

    last: dict[str, Any]

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        Seen.last = {key: value for key, value in snapshot(pl_module).items() if isinstance(value, Tensor)}


def outcome(model: str, callbacks: list[dict[str, Any]], folder: Path) -> tuple[dict[str, Any], list[Any], Any]:
    """The tensors of the model, what the report counts, and the checksum of the exported weights."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    seen = {"class_path": "tests.contracts.test_whole_set.Seen"}
    trainer = {"max_epochs": 3, "accelerator": "cpu", "callbacks": [*callbacks, seen], **quiet}
    data = {"class_path": "tests.support.data.TinyData"}
    config = {"seed_everything": 0, "model": {"class_path": model}, "data": data, "trainer": trainer}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config=config.yaml"])
    rows = json.loads((folder / "report/report.json").read_text())["rows"]
    counted = [
        [row["name"], *(row["measurement"][name] for name in ("parameters", "macs", "size_bytes"))] for row in rows
    ]
    return Seen.last, counted, json.loads((folder / "model.pt2.json").read_text())["weights_sha256"]


@pytest.mark.parametrize("family", ["linear", pytest.param("convolutions", marks=pytest.mark.slow)])
def test_both_orders_of_everything_give_the_same(family: str, own_folder: Path) -> None:
    weights, counted, file = outcome(MODELS[family], WHOLE, own_folder)
    assert [name for name, *_ in counted] == ["before", "after", "model.pt2"]
    assert counted[0][1] > counted[1][1] and any(value.dtype == torch.int8 for value in weights.values())
    other_weights, other_counted, other_file = outcome(MODELS[family], WHOLE[::-1], own_folder)
    assert_same_state(weights, other_weights)
    assert (counted, file) == (other_counted, other_file)
