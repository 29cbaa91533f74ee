"""`ScheduledPruning`, checkpoints and averaged weights: the promises to the checkpoint."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from lightning_compress import CompressionError, ScheduledPruning, Window, load_compressed
from tests.support import fits
from tests.support.data import ResumableData, TinyData
from tests.support.fits import PARTS, read_checkpoint, resume
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import (
    assert_different_state,
    assert_float_keys,
    assert_same_state,
    count_zeros,
    snapshot,
)

pytestmark = [
    # Checkpoints are read by another ModelCheckpoint, in another folder, than the one that wrote them.
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]

WEIGHTS = ("body.weight", "head.weight")
TOTAL = 16 * 32 + 32 * 4


def zeros(state: Any) -> int:
    state = state.state_dict() if isinstance(state, nn.Module) else state
    return count_zeros(state[name] for name in WEIGHTS)[0]


def pruner(method: str = "l1_unstructured", **kwargs: Any) -> ScheduledPruning:
    return ScheduledPruning(method, **{"sparsity": 0.9, "window": Window(0.1, 0.8), **kwargs})


fit = partial(fits.fit, max_epochs=4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier]:
    """A folder of checkpoints after each epoch and at the end, and the module as the fit left it."""
    folder = tmp_path_factory.mktemp("saved")
    trainer, module = fit(pruner(), folder=folder)
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder, module


@pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured", "random_structured"])
@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_resumed_equals_uninterrupted(method: str, epoch: int, tmp_path: Path) -> None:
    # N3, P13, P15.
    def run(folder: Path, ckpt_path: Path | None) -> Any:
        trainer, module = fit(pruner(method), folder=folder, ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "end.ckpt")
        return module

    _, resumed = resume(run, tmp_path, epoch, last="end.ckpt")
    if method != "random_structured":
        assert zeros(resumed) == round(0.9 * TOTAL)


def test_different_epochs_differ(saved: tuple[Path, Classifier]) -> None:
    # So that the test above can't pass because nothing happens.
    files = [read_checkpoint(saved[0] / f"epoch={epoch}.ckpt") for epoch in range(4)]
    for earlier, later in pairwise(files):
        assert_different_state(earlier["state_dict"], later["state_dict"])
    assert [zeros(file["state_dict"]) for file in files] == sorted(zeros(file["state_dict"]) for file in files)
    assert zeros(files[0]["state_dict"]) < zeros(files[-1]["state_dict"])


@pytest.mark.parametrize("at", [1, 3, 6])
def test_resuming_in_the_middle_of_an_epoch_with_accumulation(at: int, tmp_path: Path) -> None:
    def step(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    options: dict[str, Any] = {"max_epochs": 3, "accumulate_grad_batches": 2}
    fit(pruner(), step("all"), data=ResumableData(), **options)
    fit(pruner(), step("again"), data=ResumableData(), ckpt_path=tmp_path / f"all/step={at}.ckpt", **options)
    whole, resumed = (read_checkpoint(tmp_path / folder / "step=12.ckpt") for folder in ("all", "again"))
    for part in PARTS:
        assert_same_state(whole.get(part, {}), resumed.get(part, {}))


def test_a_resumed_run_keeps_the_windows_absolute_bounds(tmp_path: Path) -> None:
    fit(pruner(window=Window(0, 1)), folder=tmp_path / "all", max_epochs=2)
    again = pruner(window=Window(0, 1))
    fit(again, folder=tmp_path / "again", max_epochs=6, ckpt_path=tmp_path / "all" / "epoch=0.ckpt")
    assert (again.bounds.start, again.bounds.end) == (0, 14)


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_holds_float_keys_and_loads_strictly_without_us(weights_only: bool, tmp_path: Path) -> None:
    # N8, P6; promise 9.
    fit(pruner(), folder=tmp_path / "all", save_weights_only=weights_only)
    for path in sorted((tmp_path / "all").glob("*.ckpt")):
        checkpoint = read_checkpoint(path)
        assert_float_keys(checkpoint, Classifier())
        Classifier().load_state_dict(checkpoint["state_dict"], strict=True)
        assert checkpoint["lightning_compress"]["version"] == 1
        loaded = Classifier.load_from_checkpoint(path, weights_only=True)
        assert_same_state(checkpoint["state_dict"], loaded)
    assert zeros(read_checkpoint(tmp_path / "all" / "epoch=3.ckpt")["state_dict"]) == round(0.9 * TOTAL)


def test_a_weights_only_checkpoint_brings_the_masks_back(tmp_path: Path) -> None:
    fit(pruner(), folder=tmp_path / "all", save_weights_only=True)
    entry = read_checkpoint(tmp_path / "all" / "epoch=3.ckpt")["lightning_compress"]
    masks = [state["masks"] for state in entry["callbacks"].values()]
    assert [set(found) for found in masks] == [set(WEIGHTS)]


def test_without_the_callback_a_masked_checkpoint_trains_on(saved: tuple[Path, Classifier], tmp_path: Path) -> None:
    path = saved[0] / "epoch=1.ckpt"
    _, module = fit(folder=tmp_path, ckpt_path=path)
    # Nobody holds the masks any more; only what gets no gradient stays zero.
    assert zeros(module) < 0.5 * zeros(read_checkpoint(path)["state_dict"])


def test_load_compressed_brings_masks_for_the_next_fit(saved: tuple[Path, Classifier]) -> None:
    path = saved[0] / "end.ckpt"
    module = load_compressed(str(path), Classifier())
    assert_same_state(read_checkpoint(path)["state_dict"], module)
    pruning, before = pruner(), module.body.weight == 0
    quiet_trainer(callbacks=[pruning]).fit(module, TinyData())
    assert zeros(module) == round(0.9 * TOTAL)
    assert torch.equal(module.body.weight == 0, before)


def test_test_and_validate_from_a_masked_checkpoint(saved: tuple[Path, Classifier]) -> None:
    folder, module = saved
    file: dict[str, Any] = {"ckpt_path": folder / "end.ckpt", "verbose": False, "weights_only": True}
    expected = quiet_trainer().test(module, TinyData(), verbose=False)
    with_us, plain = Classifier(), Classifier()
    trainer = quiet_trainer(callbacks=[pruner()])
    assert trainer.test(with_us, TinyData(), **file) == expected
    assert_same_state(module, with_us)
    assert trainer.validate(with_us, TinyData(), **file)
    assert quiet_trainer().test(plain, TinyData(), **file) == expected


def test_a_plain_checkpoint_resumes_with_the_callback(tmp_path: Path) -> None:
    fit(folder=tmp_path / "all", max_epochs=2)
    start = tmp_path / "all" / "epoch=0.ckpt"
    _, module = fit(pruner(), folder=tmp_path / "x", ckpt_path=start, max_epochs=6)
    assert zeros(module) == round(0.9 * TOTAL)


def test_a_checkpoint_of_a_newer_version_is_refused_and_nothing_changes(
    saved: tuple[Path, Classifier], tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(saved[0] / "epoch=3.ckpt")
    checkpoint["lightning_compress"]["version"] = 99
    torch.save(checkpoint, tmp_path / "new.ckpt")
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(CompressionError, match="must have version 1. Received: version=99. Update"):
        load_compressed(str(tmp_path / "new.ckpt"), module)
    assert_same_state(before, module)


# Promise 4, P11, P21, N4: the monitored metric belongs to the weights that were saved.


def plain_metric(path: Path, name: str = "val_loss") -> float:
    module = Classifier()
    module.load_state_dict(read_checkpoint(path)["state_dict"])
    return quiet_trainer().validate(module, TinyData(), verbose=False)[0][name]


class Averaged(WeightAveraging):
    """From the first step on."""

    def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
        return step_idx is not None


AVERAGES: dict[str, Any] = {
    "none": lambda: [],
    "ema": lambda: [EMAWeightAveraging(decay=0.8)],
    "ema late": lambda: [EMAWeightAveraging(decay=0.8, update_starting_at_step=9)],
    "average": lambda: [Averaged()],
    "swa": lambda: [StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)],
}


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("name", [name for name in AVERAGES if name != "swa"])
def test_the_monitored_metric_is_that_of_the_saved_weights(name: str, ours_first: bool, tmp_path: Path) -> None:
    metrics: dict[str, float] = {}

    class Records(ModelCheckpoint):
        def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            metrics[filepath] = float(trainer.callback_metrics["val_loss"])

    checkpoint = Records(tmp_path / "all", filename="{epoch}", monitor="val_loss", save_top_k=-1)
    others = AVERAGES[name]()
    callbacks = [pruner(), *others] if ours_first else [*others, pruner()]
    fit(*callbacks, checkpoint)
    assert len(metrics) == 4
    for path, metric in metrics.items():
        assert plain_metric(Path(path)) == pytest.approx(metric, rel=1e-6), path


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights only"])
@pytest.mark.parametrize("name", AVERAGES)
def test_what_is_saved_is_exactly_sparse(name: str, weights_only: bool, ours_first: bool, tmp_path: Path) -> None:
    # P17, P21: each save, the average too.
    pruning = pruner(window=Window(0, 0.5))
    others = AVERAGES[name]()
    callbacks = [pruning, *others] if ours_first else [*others, pruning]
    expected: dict[int, int] = {}

    class Expects(Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            expected[trainer.current_epoch] = sum(int((~mask).sum()) for mask in pruning.masks.values())

    trainer, module = fit(*callbacks, Expects(), folder=tmp_path / "all", save_weights_only=weights_only, max_epochs=5)
    files = sorted((tmp_path / "all").glob("*.ckpt"))
    assert len(files) == (6 if name == "swa" else 5)  # SWA's last epoch renews BatchNorm statistics alone
    for epoch, path in enumerate(files):
        checkpoint = read_checkpoint(path)
        assert_float_keys(checkpoint, Classifier())
        assert zeros(checkpoint["state_dict"]) == expected[epoch], path
        if "current_model_state" in checkpoint:
            assert zeros(checkpoint["current_model_state"]) == expected[epoch]
    assert expected[4] == round(0.9 * TOTAL) == zeros(module)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert zeros(read_checkpoint(tmp_path / "end.ckpt")["state_dict"]) == round(0.9 * TOTAL)


@pytest.mark.parametrize("name", ["ema", "average"])
def test_resumed_equals_uninterrupted_with_an_average(name: str, tmp_path: Path) -> None:
    resume(lambda **files: fit(pruner(), *AVERAGES[name](), **files), tmp_path, 1)


def test_p6_saving_each_epoch_changes_no_mask(tmp_path: Path) -> None:
    a, b = pruner(), pruner()
    fit(a, folder=tmp_path / "all")
    fit(b, ModelCheckpoint(tmp_path / "none", save_top_k=0))
    assert_same_state(a.masks, b.masks)
    assert sum(int((~mask).sum()) for mask in a.masks.values()) == round(0.9 * TOTAL)


@pytest.mark.parametrize("content", ["missing", "text", "list", "other model"])
def test_files_that_do_not_load_leave_the_model_as_it_was(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    if content == "text":
        path.write_text("nothing")
    elif content == "list":
        torch.save([1], path)
    elif content == "other model":
        torch.save({"state_dict": Classifier(hidden=64).state_dict()}, path)
    module = Classifier()
    before = snapshot(module)
    with pytest.raises(CompressionError, match=r"`path` must .*Received: path='.*bad\.ckpt'"):
        load_compressed(str(path), module)
    assert_same_state(before, module)
