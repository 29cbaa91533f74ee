"""`best_is_sparse`: the best checkpoint is one of the final sparsity, whatever scores came before (P21)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_compress import ScheduledPruning, Window
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import assert_same_state, count_zeros

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

WEIGHTS = ("body.weight", "head.weight")
GOAL = round(0.8 * (16 * 32 + 32 * 4))
EPOCHS, DENSE = 8, 4
"""The window ends with the fourth epoch: epochs 0 to 2 are less sparse than they shall be."""


class Scored(Classifier):
    """Its scores get worse from epoch to epoch, so that the best are the earliest."""

    def on_validation_epoch_end(self) -> None:
        epoch = float(self.current_epoch)
        self.log("loss", torch.tensor(1.0 + epoch))
        self.log("accuracy", torch.tensor(1.0 - epoch / 100))


def pruner(**kwargs: Any) -> ScheduledPruning:
    return ScheduledPruning(sparsity=0.8, window=Window(0, DENSE, unit="epoch"), **kwargs)


def saver(folder: Path, mode: str, top_k: int) -> ModelCheckpoint:
    monitor = "loss" if mode == "min" else "accuracy"
    return ModelCheckpoint(folder, filename="{epoch}", monitor=monitor, mode=mode, save_top_k=top_k)


def fit(folder: Path, mode: str, top_k: int, epochs: int = EPOCHS, path: Any = None, **kwargs: Any) -> ModelCheckpoint:
    torch.manual_seed(0)
    checkpoint = saver(folder, mode, top_k)
    trainer = quiet_trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[pruner(**kwargs), checkpoint])
    trainer.fit(Scored(), TinyData(), ckpt_path=path, weights_only=True)
    return checkpoint


def zeros(path: Any) -> int:
    state = torch.load(path, weights_only=True)["state_dict"]
    return count_zeros(state[name] for name in WEIGHTS)[0]


def on_disk(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.ckpt")}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("top_k", [1, 2, 3, -1])
def test_p21_the_best_checkpoint_is_sparse_although_earlier_scores_were_better(
    top_k: int, mode: str, tmp_path: Path
) -> None:
    checkpoint = fit(tmp_path / "a", mode, top_k, best_is_sparse=True)
    assert Path(checkpoint.best_model_path).stem == "epoch=3"
    assert zeros(checkpoint.best_model_path) == GOAL
    assert float(checkpoint.best_model_score) == pytest.approx(4.0 if mode == "min" else 0.97)
    if top_k > 0:
        assert on_disk(tmp_path / "a") == {f"epoch={epoch}" for epoch in range(3, 3 + top_k)}
        assert all(zeros(path) == GOAL for path in (tmp_path / "a").glob("*.ckpt"))
        assert {Path(path).stem for path in checkpoint.best_k_models} == on_disk(tmp_path / "a")
    else:
        assert on_disk(tmp_path / "a") == {f"epoch={epoch}" for epoch in range(EPOCHS)}


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_without_it_scores_decide_alone(top_k: int, mode: str, tmp_path: Path) -> None:
    assert not pruner().best_is_sparse
    checkpoint = fit(tmp_path / "a", mode, top_k)
    assert Path(checkpoint.best_model_path).stem == "epoch=0"
    assert zeros(checkpoint.best_model_path) < GOAL
    assert on_disk(tmp_path / "a") == {f"epoch={epoch}" for epoch in range(top_k)}


@pytest.mark.parametrize(
    ("folder", "at", "top_k"),
    [
        ("the same folder", 1, 1),
        ("the same folder", 1, 2),
        ("the same folder", 2, -1),
        ("the same folder", 4, 1),
        ("the same folder", 4, 2),
        ("another folder", 1, 1),
        ("another folder", 4, 2),
    ],
)
def test_a_resumed_run_ends_with_the_same_best(folder: str, at: int, top_k: int, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", "min", top_k, best_is_sparse=True)
    # The first part stops, as if it was killed, after epoch `at`; its last checkpoint is the one to go on from.
    torch.manual_seed(0)
    where = tmp_path / "parts"
    first = [pruner(best_is_sparse=True), saver(where, "min", top_k)]
    last = ModelCheckpoint(tmp_path / "last", filename="last {epoch}", every_n_epochs=1)
    trainer = quiet_trainer(max_epochs=at + 1, enable_checkpointing=True, callbacks=[*first, last])
    if at + 1 < DENSE:
        with pytest.warns(UserWarning, match="before its window's end"):
            trainer.fit(Scored(), TinyData())
    else:
        trainer.fit(Scored(), TinyData())
    path = Path(last.best_model_path)
    again = where if folder == "the same folder" else tmp_path / "other"
    resumed = fit(again, "min", top_k, path=path, best_is_sparse=True)
    expected = "epoch=3" if folder == "the same folder" or at < 3 else f"epoch={at + 1}"
    assert Path(resumed.best_model_path).stem == expected
    assert zeros(resumed.best_model_path) == GOAL
    if folder == "the same folder":
        assert float(resumed.best_model_score) == float(whole.best_model_score)
        assert on_disk(where) == on_disk(tmp_path / "whole")
        for name in on_disk(where):
            resumed, uninterrupted = (
                torch.load(f / f"{name}.ckpt", weights_only=True) for f in (where, tmp_path / "whole")
            )
            assert_same_state(resumed["state_dict"], uninterrupted["state_dict"])


def test_a_score_that_is_better_after_the_window_wins(tmp_path: Path) -> None:
    class Dips(Scored):
        def on_validation_epoch_end(self) -> None:
            self.log("loss", torch.tensor(5.0 if self.current_epoch == 6 else 7.0 + self.current_epoch))

    checkpoint = saver(tmp_path / "a", "min", 1)
    callbacks = [pruner(best_is_sparse=True), checkpoint]
    quiet_trainer(max_epochs=EPOCHS, enable_checkpointing=True, callbacks=callbacks).fit(Dips(), TinyData())
    assert Path(checkpoint.best_model_path).stem == "epoch=6"


def test_the_window_may_end_with_the_fit(tmp_path: Path) -> None:
    checkpoint = saver(tmp_path / "a", "min", 1)
    pruning = ScheduledPruning(sparsity=0.8, window=Window(0, 1), best_is_sparse=True)
    quiet_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[pruning, checkpoint]).fit(Scored(), TinyData())
    assert Path(checkpoint.best_model_path).stem == "epoch=2"
    assert zeros(checkpoint.best_model_path) == GOAL and on_disk(tmp_path / "a") == {"epoch=2"}


@pytest.mark.parametrize("checkpoint_first", [False, True])
def test_validation_within_an_epoch_and_two_checkpoints(checkpoint_first: bool, tmp_path: Path) -> None:
    a = ModelCheckpoint(tmp_path / "a", filename="{step}", monitor="loss")
    b = ModelCheckpoint(tmp_path / "b", filename="{step}", monitor="accuracy", mode="max", save_top_k=2)
    pruning = pruner(best_is_sparse=True)
    callbacks = [a, pruning, b] if checkpoint_first else [pruning, a, b]
    quiet_trainer(max_epochs=EPOCHS, val_check_interval=3, enable_checkpointing=True, callbacks=callbacks).fit(
        Scored(), TinyData()
    )
    for checkpoint in (a, b):
        assert zeros(checkpoint.best_model_path) == GOAL
        assert all(zeros(path) == GOAL for path in checkpoint.best_k_models)


def test_checkpoints_without_a_monitor_are_left_alone(tmp_path: Path) -> None:
    plain = ModelCheckpoint(tmp_path / "a", filename="{epoch}")
    last = ModelCheckpoint(tmp_path / "b", save_last=True, every_n_epochs=2)
    callbacks = [pruner(best_is_sparse=True), plain, last]
    quiet_trainer(max_epochs=EPOCHS, enable_checkpointing=True, callbacks=callbacks).fit(Scored(), TinyData())
    assert on_disk(tmp_path / "a") == {"epoch=7"} and "last" in on_disk(tmp_path / "b")


def test_test_with_the_best_checkpoint_tests_a_sparse_model(tmp_path: Path) -> None:
    module, checkpoint = Scored(), saver(tmp_path / "a", "min", 1)
    trainer = quiet_trainer(
        max_epochs=EPOCHS, enable_checkpointing=True, callbacks=[pruner(best_is_sparse=True), checkpoint]
    )
    trainer.fit(module, TinyData())
    trainer.test(module, TinyData(), ckpt_path="best", verbose=False, weights_only=True)
    assert count_zeros([module.body.weight, module.head.weight])[0] == GOAL


def test_a_run_that_stops_before_the_windows_end_forgets_nothing(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="before its window's end"):
        checkpoint = fit(tmp_path / "a", "min", 1, epochs=DENSE - 1, best_is_sparse=True)
    assert Path(checkpoint.best_model_path).stem == "epoch=0"
