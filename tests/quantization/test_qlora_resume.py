"""Fits with adapters that are resumed, and in two processes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import (
    QLoRA,
    QuantizationAwareTraining,
    Targets,
    WeightOnly,
    load_compressed,
    merge_adapters,
)
from tests.quantization.lora.files import AVERAGES, fit
from tests.quantization.lora.fits import BOTH, Held, Net, mlp
from tests.quantization.test_qlora import Plateau, TwoManual
from tests.support.data import ResumableData, TinyData
from tests.support.ddp import run_ranks
from tests.support.fits import read_checkpoint, resume
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot

pytestmark = [
    # Checkpoints are read by another ModelCheckpoint, in another folder, than the one that wrote them.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory:UserWarning"),
]

# Resuming.


@pytest.mark.parametrize("others", AVERAGES)
def test_resumed_equals_uninterrupted(others: str, tmp_path: Path) -> None:
    def run(**files: Any) -> Any:
        return fit(QLoRA(rank=2, modules_to_train=["head"]), *AVERAGES[others](), **files)[1]

    whole, resumed = resume(run, tmp_path, 0, 1)
    assert_same_state(snapshot(whole), snapshot(resumed))
    for earlier, later in pairwise(read_checkpoint(tmp_path / f"whole/epoch={epoch}.ckpt") for epoch in range(3)):
        for name in BOTH:
            assert not torch.equal(earlier["state_dict"][name], later["state_dict"][name])


def test_resumed_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    def run(folder: str, ckpt_path: Any = None) -> Any:
        save = ModelCheckpoint(tmp_path / folder, filename="{step}", save_top_k=-1, every_n_train_steps=3)
        options = {"data": ResumableData(), "ckpt_path": ckpt_path, "module": Net(mlp(24, 24, 4)), "max_epochs": 2}
        torch.manual_seed(4)
        return fit(QLoRA(rank=2), save, folder=tmp_path / f"{folder} too", **options)[1]

    whole = run("whole")
    resumed = run("again", tmp_path / "whole" / "step=3.ckpt")
    assert_same_state(whole, resumed)


@pytest.mark.parametrize("start", ["other weights", "loaded", "trained on"])
def test_a_resumed_fit_takes_the_base_of_the_file(start: str, tmp_path: Path) -> None:
    _, whole = fit(QLoRA(rank=2), folder=tmp_path / "whole")
    path = tmp_path / "whole" / "epoch=0.ckpt"
    torch.manual_seed(321)
    module = Classifier()
    if start == "loaded":
        load_compressed(tmp_path / "whole" / "epoch=1.ckpt", module)
    elif start == "trained on":
        quiet_trainer(callbacks=[QLoRA(rank=2)]).fit(module, TinyData())
    _, resumed = fit(QLoRA(rank=2), folder=tmp_path / "again", module=module, ckpt_path=path)
    assert_same_state(whole, resumed)


@pytest.mark.parametrize("epoch", [1])
def test_a_manual_fit_with_several_optimizers_resumes(epoch: int, tmp_path: Path) -> None:
    def run(folder: str, ckpt_path: Any = None) -> Any:
        qlora = QLoRA(rank=2, targets=Targets(include=["body", "middle"]))
        torch.manual_seed(4)
        return fit(qlora, folder=tmp_path / folder, module=TwoManual(toggle=True), ckpt_path=ckpt_path)[1]

    whole = run("whole")
    resumed = run("again", tmp_path / "whole" / f"epoch={epoch}.ckpt")
    assert_same_state(whole, resumed)


def test_an_optimizer_that_fills_its_state_at_once_is_saved_and_resumed(tmp_path: Path) -> None:
    _, whole = fit(QLoRA(rank=2), folder=tmp_path / "whole", module=Plateau())
    _, resumed = fit(
        QLoRA(rank=2), folder=tmp_path / "again", module=Plateau(), ckpt_path=tmp_path / "whole/epoch=0.ckpt"
    )
    assert_same_state(whole, resumed)


def test_a_module_that_loads_weights_in_its_setup_resumes(tmp_path: Path) -> None:
    class Loads(Classifier):
        def setup(self, stage: str) -> None:
            if stage == "fit":
                with torch.random.fork_rng():
                    torch.manual_seed(77)
                    self.load_state_dict(Classifier().state_dict())

    _, whole = fit(QLoRA(rank=2), folder=tmp_path / "whole", module=Loads())
    _, resumed = fit(
        QLoRA(rank=2), folder=tmp_path / "again", module=Loads(), ckpt_path=tmp_path / "whole/epoch=0.ckpt"
    )
    assert_same_state(whole, resumed)


# Two processes.


def adapt(folder: Path) -> dict[str, Any]:
    module, held, data = Classifier(), Held(), TinyData(samples=48)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 2}
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = quiet_trainer(callbacks=[QLoRA(rank=2), held, save], enable_checkpointing=True, **options)
    # Each rank has a random state and a model of its own: those of the first rank count.
    torch.manual_seed(100 + trainer.global_rank)
    trainer.fit(module, data)
    again = Classifier()
    quiet_trainer(callbacks=[QLoRA(rank=2)], **options).fit(
        again, data, ckpt_path=folder / "epoch=0.ckpt", weights_only=True
    )
    torch.manual_seed(0)
    few = Classifier()
    quiet_trainer(**{**options, "callbacks": [QuantizationAwareTraining(WeightOnly(4, 8))], "max_epochs": 1}).fit(
        few, data
    )
    return {
        "trained": snapshot(module),
        "resumed": snapshot(again),
        "merged": snapshot(merge_adapters(module)),
        "held": sorted(held.names),
        "few bits": snapshot(few),
    }


@pytest.mark.slow
def test_adapters_are_equal_on_both_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(adapt, tmp_path)
    assert_same_state(first, second)
    assert first["held"] == [f"body.lora_{name}" for name in "AB"]
    assert_same_state(first["trained"], first["resumed"])
    assert first["trained"]["body.lora_B"].any()
    assert list(first["merged"]) == list(Classifier().state_dict())
    assert first["few bits"]["body.weight"].dtype == torch.uint8
    # The file that the first rank wrote is the module of both.
    loaded = load_compressed(tmp_path / "epoch=1.ckpt", Classifier())
    assert_same_state(loaded, first["trained"])
    Classifier().load_state_dict(first["merged"], strict=True)
