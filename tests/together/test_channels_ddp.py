from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel

from lightning_compress import ChannelPruning, CompressionError, Linear, ScheduledPruning, Window
from lightning_compress.channels import remove_in_fit
from tests.support.data import TinyData
from tests.support.ddp import run_ranks
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, snapshot


class Records(Callback):
    """Weights, momenta and gradients after each batch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.wrappers: list[Any] = []
        self.gradients: list[Any] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: parameter.grad.clone() for name, parameter in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state, parameters = trainer.optimizers[0].state, dict(pl_module.named_parameters())
        momenta = {name: state[parameter]["momentum_buffer"].clone() for name, parameter in parameters.items()}
        self.batches.append({"weights": snapshot(parameters), "momenta": momenta})
        assert isinstance(trainer.strategy.model, DistributedDataParallel)
        # Kept, so that no two have the same id.
        self.wrappers.append(trainer.strategy.model)


def cut(importance: str) -> dict[str, Any]:
    module, records = Classifier(), Records()
    window = Window(2, 8, unit="step", every_n_steps=3)
    batches = 3 if importance == "outputs" else 0
    channels = ChannelPruning(
        macs=0.5, importance=importance, schedule=Linear(), window=window, round_to=1, calibration_batches=batches
    )
    callbacks = [ScheduledPruning(sparsity=0.5, window=Window(3, 9, unit="step")), channels, records]
    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=4, callbacks=callbacks)
    torch.manual_seed(100 + trainer.global_rank)  # ranks that draw differently must still cut the same
    trainer.fit(module, TinyData(samples=48))
    return {
        "batches": records.batches,
        "gradients": records.gradients,
        "wrappers": len({id(wrapper) for wrapper in records.wrappers}),
        "drawn": torch.rand(3),
        "notes": channels.report_notes(),
        "numbers": [module.body.out_features, module.norm.num_features, module.head.in_features],
    }


@pytest.mark.slow
@pytest.mark.parametrize("importance", ["l2", "taylor", "random", "outputs"])
def test_ranks_with_different_data_and_seeds_keep_the_same_channels(importance: str) -> None:
    first, second = run_ranks(cut, importance)
    widths = [len(batch["weights"]["body.bias"]) for batch in first["batches"]]
    assert len(widths) == 12 and widths[0] == 32 and widths[-1] == 16 and len(set(widths)) == 3
    assert first["wrappers"] == second["wrappers"] == 3
    assert first["numbers"] == second["numbers"] == [16, 16, 16]
    # The cut keeps what is equal equal, and the wrapper goes on reducing gradients after it.
    assert_same_state(first["batches"], second["batches"])
    assert_same_state(first["gradients"], second["gradients"])
    assert first["gradients"][-1]["body.weight"].any()
    assert first["notes"] == second["notes"]
    assert any("samples of the train loader" in note for note in first["notes"]) == (importance == "outputs")
    assert not torch.equal(first["drawn"], second["drawn"])


def cut_where_it_breaks(rank: int) -> dict[str, Any]:
    """By default, where one rank can't measure or fit."""
    if int(os.environ.get("LOCAL_RANK", 0)) == rank:
        remove_in_fit.output_changes = remove_in_fit.fitted_narrow = None  # type: ignore[assignment]
    channels, records = ChannelPruning(macs=0.5, round_to=1), Records()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet_trainer(devices=2, strategy="ddp", max_epochs=2, callbacks=[channels, records]).fit(
            Classifier(), TinyData(samples=48)
        )
    notes = channels.report_notes()
    return {
        "batches": records.batches,
        "fitted": any("samples of the train loader" in note for note in notes),
        "said": any("doesn't calibrate" in str(one.message) for one in said),
    }


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_ranks_calibration_counts_for_all(rank: int) -> None:
    first, second = run_ranks(cut_where_it_breaks, rank)
    assert len(first["batches"][-1]["weights"]["body.bias"]) == 16
    assert_same_state(first["batches"], second["batches"])
    assert first["fitted"] == second["fitted"] == (rank == 1)
    assert first["said"] == (rank == 0)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_a_strategy_that_loses_structure_is_refused_in_setup(strategy: str) -> None:
    # Launched for real it would train in processes of its own: setup alone is asked.
    trainer = quiet_trainer(devices=2, strategy=strategy)
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(CompressionError, match="returns weights from its processes without structure.*strategy='ddp'"):
        ChannelPruning(macs=0.5).setup(trainer, module, "fit")
    assert_same_state(before, snapshot(module))
    assert vars(module).keys() == vars(Classifier()).keys()


@pytest.mark.slow
def test_ddp_spawn_is_refused_before_anything_is_launched() -> None:
    trainer = quiet_trainer(devices=2, strategy="ddp_spawn", callbacks=[ChannelPruning(macs=0.5)])
    with pytest.raises(Exception, match="returns weights from its processes without structure"):
        trainer.fit(Classifier(), TinyData())
