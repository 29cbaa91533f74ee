"""Runs that are killed at a random moment, and resumed: each a forked child, so that the imports are paid once.

Writes one JSON line for each kill: where it happened, from which file the run went on, and what differs at the end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_compress import (
    ChannelPruning,
    Distillation,
    EMATeacher,
    FeatureMSE,
    Linear,
    Ramp,
    Rewind,
    ScheduledPruning,
    SoftTarget,
    Steps,
    Targets,
    Window,
)
from tests.support.data import ResumableData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import differing

PER_EPOCH, EPOCHS, EVERY = 15, 2, 2
"""Never saved at an epoch's last batch: from such a file Lightning itself leaves out an epoch."""

WINDOW = Window(4, 24, unit="step", every_n_steps=3)


def taught(teacher: torch.nn.Module, layer: str) -> Distillation:
    """An adapter where the widths differ, and a ramp that is on its way when the run is killed."""
    losses = [SoftTarget(), FeatureMSE("body", layer)]
    return Distillation(
        teacher, losses, task_weight=0.5, ramps=[Ramp("soft_target", "temperature", 8.0, window=WINDOW)]
    )


def wide() -> Classifier:
    torch.manual_seed(7)
    return Classifier(hidden=48)


def fewer_channels(importance: str) -> ChannelPruning:
    """Some leave every three steps, so that most kills come between two removals."""
    return ChannelPruning(macs=0.5, importance=importance, schedule=Linear(), window=WINDOW, round_to=1)


SETTINGS: dict[str, Callable[[], Any]] = {
    "distillation": lambda: taught(wide(), "body"),
    "mean teacher": lambda: taught(EMATeacher(0.9), "body"),
    "taylor": lambda: ScheduledPruning("taylor", 0.8, window=WINDOW),
    "structured": lambda: ScheduledPruning(
        "ln_structured", 0.5, "layer", window=WINDOW, targets=Targets(include=["body"])
    ),
    "rewinding": lambda: ScheduledPruning(
        sparsity=0.8, schedule=Steps(), window=Window(4, 24, unit="step"), rewind=Rewind(2)
    ),
    "regrow": lambda: ScheduledPruning("taylor", 0.6, regrow=True, window=WINDOW),
    "random": lambda: ScheduledPruning("random_unstructured", 0.7, window=WINDOW),
    "channels": lambda: fewer_channels("l2"),
    "channels by taylor": lambda: fewer_channels("taylor"),
    "channels with calibration": lambda: ChannelPruning(
        macs=0.5, schedule=Linear(), window=WINDOW, round_to=1, calibration_batches=3
    ),
}
HOOKS = ("on_before_optimizer_step", "on_train_batch_end", "on_validation_batch_start", "on_save_checkpoint")


class Net(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Kill(Callback):
    """Ends the process, without a word to anyone, in the given hook once the given step has been reached."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.perhaps)

    def perhaps(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= self.step and not trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGKILL)


class KillAfterSaving(ModelCheckpoint):
    """Ends the process right after a file was written, or in the middle of writing it."""

    def __init__(self, *args: Any, step: int, torn: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step, self.torn = step, torn

    @property
    def state_key(self) -> str:
        return super().state_key.replace("KillAfterSaving", "ModelCheckpoint")

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.global_step >= self.step:
            if self.torn:
                os.truncate(filepath, os.path.getsize(filepath) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def run(setting: str, folder: Path, hook: str = "", step: int = 0, resume: Path | None = None) -> None:
    """One fit; it saves what it ended with."""
    torch.set_num_threads(1)
    settings: Any = {"filename": "{step}", "every_n_train_steps": EVERY, "save_top_k": -1}
    killers: list[Callback] = []
    save = ModelCheckpoint(folder, **settings)
    if hook in ("after a save", "within a save"):
        save = KillAfterSaving(folder, **settings, step=step, torn=hook == "within a save")
    elif hook:
        killers = [Kill(hook, step)]
    callback = SETTINGS[setting]()
    torch.manual_seed(0)
    trainer = quiet_trainer(
        max_epochs=EPOCHS, enable_checkpointing=True, val_check_interval=3, callbacks=[*killers, callback, save]
    )
    module = Net()
    trainer.fit(module, ResumableData(samples=8 * PER_EPOCH), ckpt_path=resume, weights_only=True)
    [optimizer] = trainer.optimizers
    end = {"weights": module.state_dict(), "optimizer": optimizer.state_dict()["state"]}
    torch.save({**end, "masks": getattr(callback, "masks", {}), "callback": callback.state_dict()}, folder / "end.pt")


def child(*args: Any, **kwargs: Any) -> int:
    """Run in a process of its own; the signal that ended it, or 0."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(*args, **kwargs)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"A run of {args} {kwargs} failed.")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def readable(path: Path) -> bool:
    try:
        torch.load(path, weights_only=True)
    except Exception:
        return False
    return True


def last_readable(folder: Path) -> Path | None:
    """The checkpoint of the latest step that loads."""
    by_step = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]), reverse=True)
    return next((path for path in by_step if readable(path)), None)


def main(folder: Path, kills: int, seed: int) -> None:
    warnings.filterwarnings("ignore")
    draw = random.Random(seed)
    for setting in SETTINGS:
        child(setting, folder / setting)
    for number in range(kills):
        setting = list(SETTINGS)[number % len(SETTINGS)]
        hook = draw.choice([*HOOKS[:3], "after a save", "within a save"])
        step = draw.randint(1, EPOCHS * PER_EPOCH - 3)
        mine = folder / str(number)
        killed = child(setting, mine, hook, step) == signal.SIGKILL
        start = last_readable(mine)
        child(setting, mine / "again", resume=start)
        whole, resumed = (torch.load(f / "end.pt", weights_only=True) for f in (folder / setting, mine / "again"))
        report = {"setting": setting, "hook": hook, "step": step, "killed": killed}
        differences = differing(whole, resumed)
        print(json.dumps({**report, "from": start and start.stem, "differences": differences}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
