"""`PhaseCheckpoint`: the best model of a phase, whatever scores came before and after it."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_compress import (
    ChannelPruning,
    CompressionError,
    PhaseCheckpoint,
    QuantizationAwareTraining,
    ScheduledPruning,
    Window,
)
from lightning_compress.cli import main
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
EPOCHS = 8


class Scored(Classifier):
    """Its scores get worse from epoch to epoch, so that the best of all are the earliest."""

    def on_validation_epoch_end(self) -> None:
        epoch = float(self.current_epoch)
        self.log("loss", torch.tensor(1.0 + epoch))
        self.log("accuracy", torch.tensor(1.0 - epoch / 100))


def pruner(start: float = 2, end: float = 4, **kwargs: Any) -> ScheduledPruning:
    return ScheduledPruning(sparsity=0.8, window=Window(start, end, unit="epoch"), **kwargs)


def fit(*callbacks: Callback, module: Any = None, epochs: int = EPOCHS, path: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"max_epochs": epochs, "enable_checkpointing": True, "callbacks": list(callbacks), **options}
    module = module or Scored()
    trainer = quiet_trainer(**options)
    trainer.fit(module, TinyData(), ckpt_path=path, weights_only=True)
    return trainer


def zeros(path: Any) -> int:
    state = torch.load(path, weights_only=True)["state_dict"]
    return count_zeros(state[name] for name in WEIGHTS)[0]


def saver(phase: Any, folder: Path, mode: Any = "max", **kwargs: Any) -> PhaseCheckpoint:
    return PhaseCheckpoint(phase, "accuracy" if mode == "max" else "loss", mode, folder, **kwargs)


def epoch_of(path: Any) -> int:
    return int(torch.load(path, weights_only=True)["epoch"])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_one_run_gives_the_best_of_each_phase(mode: str, tmp_path: Path) -> None:
    saves = [saver(phase, tmp_path, mode) for phase in ("quantized", "dense", "pruned")]
    qat = QuantizationAwareTraining(window=Window(6, unit="epoch"))
    fit(*saves, pruner(), qat)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"best-{name}.ckpt" for name in ("dense", "pruned", "quantized")
    }
    # Epochs 0 and 1 are dense, masks grow in 2 and 3, which ends sparse; 6 is the first that trains for int8.
    assert {save.phase: epoch_of(save.best_model_path) for save in saves} == {"dense": 0, "pruned": 3, "quantized": 6}
    dense, pruned, quantized = (torch.load(tmp_path / f"best-{name}.ckpt", weights_only=True)
                                for name in ("dense", "pruned", "quantized"))  # fmt: skip
    assert zeros(tmp_path / "best-dense.ckpt") == 0 and zeros(tmp_path / "best-pruned.ckpt") == GOAL
    assert zeros(tmp_path / "best-quantized.ckpt") == GOAL
    changes = [
        checkpoint.get("lightning_compress", {}).get("quantization") for checkpoint in (dense, pruned, quantized)
    ]
    assert changes[:2] == [None, None] and changes[2]["form"] == "prepared"


@pytest.mark.parametrize("top_k", [2, -1])
def test_several_are_kept_of_the_phase_alone(top_k: int, tmp_path: Path) -> None:
    save = saver("pruned", tmp_path, save_top_k=top_k, filename="{epoch}")
    fit(pruner(), save)
    kept = {path.stem for path in tmp_path.iterdir()}
    assert kept == {f"epoch={epoch}" for epoch in range(3, 5 if top_k == 2 else EPOCHS)}


def test_channels_count_as_pruned_when_the_last_have_left(tmp_path: Path) -> None:
    module, save = Scored(), saver("pruned", tmp_path)
    removal = ChannelPruning(channels=0.5, round_to=1, calibration_batches=0, window=Window(2, 4, unit="epoch"))
    fit(removal, save, module=module)
    assert epoch_of(save.best_model_path) == 3
    state = torch.load(save.best_model_path, weights_only=True)["state_dict"]
    assert len(state["body.weight"]) == module.body.out_features < 32


def test_all_that_prunes_must_have_ended(tmp_path: Path) -> None:
    dense, pruned = saver("dense", tmp_path), saver("pruned", tmp_path)
    first = ScheduledPruning(sparsity=0.5, window=Window(1, 2, unit="epoch"), method="l1_unstructured")
    fit(first, pruner(4, 6), dense, pruned)
    assert (epoch_of(dense.best_model_path), epoch_of(pruned.best_model_path)) == (0, 5)


def test_quantized_is_a_model_of_which_nothing_is_being_pruned(tmp_path: Path) -> None:
    save = saver("quantized", tmp_path)
    fit(pruner(2, 6), QuantizationAwareTraining(window=Window(4, unit="epoch")), save)
    assert epoch_of(save.best_model_path) == 5 and zeros(save.best_model_path) == GOAL


def test_validations_within_epochs(tmp_path: Path) -> None:
    save = saver("pruned", tmp_path)
    fit(pruner(), save, val_check_interval=3)
    assert zeros(save.best_model_path) == GOAL


@pytest.mark.parametrize("at", [2, 4])
def test_a_resumed_run_ends_with_the_same_best(at: int, tmp_path: Path) -> None:
    def saves(folder: str) -> list[PhaseCheckpoint]:
        return [saver(phase, tmp_path / folder) for phase in ("dense", "pruned")]

    whole, parts, resumed = saves("whole"), saves("parts"), saves("parts")
    fit(pruner(), *whole)
    stops = pytest.warns(UserWarning, match="before its window's end") if at < 3 else nullcontext()
    with stops, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="PhaseCheckpoint: no validation saw a pruned model")
        trainer = fit(pruner(), *parts, epochs=at + 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(pruner(), *resumed, path=tmp_path / "last.ckpt")
    for one, other in zip(whole, resumed, strict=True):
        assert float(one.best_model_score) == float(other.best_model_score)
        states = [torch.load(save.best_model_path, weights_only=True)["state_dict"] for save in (one, other)]
        assert_same_state(*states)


def test_the_best_is_tested(tmp_path: Path) -> None:
    module, save = Scored(), saver("pruned", tmp_path)
    trainer = fit(pruner(), save, module=module)
    trainer.test(module, TinyData(), ckpt_path="best", verbose=False, weights_only=True)
    assert count_zeros([module.body.weight, module.head.weight])[0] == GOAL


@pytest.mark.parametrize("sanity_steps", [0, 2])
def test_a_phase_that_no_validation_saw(sanity_steps: int, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="PhaseCheckpoint: no validation saw a dense model"):
        fit(pruner(0, 4), saver("dense", tmp_path), num_sanity_val_steps=sanity_steps)


def test_a_phase_that_nothing_brings() -> None:
    with pytest.raises(CompressionError) as raised:
        fit(pruner(), PhaseCheckpoint("quantized", "accuracy", "max"))
    assert str(raised.value) == (
        "`phase` must be one that a callback of this Trainer brings the model to. Received: phase='quantized'. Add "
        "QuantizationAwareTraining."
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"phase": "sparse", "monitor": "acc", "mode": "max"}, "`phase` must be 'dense', 'pruned' or 'quantized'"),
        ({"phase": "dense", "monitor": "acc", "mode": "auto"}, "`mode` must be 'max' or 'min'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressionError, match=words):
        PhaseCheckpoint(**settings)


def test_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"""
model: {{class_path: tests.choosing.test_phases.Scored}}
data: {{class_path: tests.support.data.TinyData}}
trainer:
  max_epochs: 5
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  callbacks:
    - class_path: ScheduledPruning
      init_args: {{sparsity: 0.8, window: {{start: 2, end: 4, unit: epoch}}}}
    - class_path: PhaseCheckpoint
      init_args: {{phase: pruned, monitor: accuracy, mode: max, dirpath: {tmp_path}/best}}
"""
    )
    main(["fit", "--config", str(config)])
    assert zeros(tmp_path / "best" / "best-pruned.ckpt") == GOAL
