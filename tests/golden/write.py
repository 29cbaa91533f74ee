"""Writes the golden checkpoints anew, on purpose: ``python -m tests.golden.write [name ...]``.

What reads them must give what is written now. So run this only where the format, or what is computed, was changed on
purpose, and say so in the commit.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from lightning_compress import load_compressed, save_compressed
from tests.golden.cases import CASES, FOLDER, Case, facts, quiet_trainer
from tests.golden.networks import calibration, loader

EXPECTED = FOLDER / "expected.json"


class SaveFirstEpoch(Callback):
    """Saves after the first epoch, and keeps no state of its own, such as a folder."""

    def __init__(self, path: str, weights_only: bool) -> None:
        self.path = path
        self.weights_only = weights_only
        self.facts: dict[str, Any] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)
            self.facts = facts(pl_module, trainer.callbacks)  # type: ignore[attr-defined]


def write(case: Case) -> dict[str, Any]:
    """Write the file of a case; returns what is expected of whoever reads it."""
    torch.manual_seed(1)
    model, found = case.build(), {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + (parameter.dim() > 1)  # outputs that depend on the inputs, and on each layer
    if case.compress is not None:
        save_compressed(case.compress(model), case.path)
    else:
        assert case.callbacks is not None
        weights_only = case.flag == "weights_only"
        save = SaveFirstEpoch(case.path, weights_only)
        trainer = quiet_trainer([*case.callbacks(), *[save] * (case.resumes or weights_only)])
        trainer.fit(model, loader(case.kind))
        if case.flag == "tested":
            model.calibration_dataloader = lambda: calibration(case.kind)
            trainer.test(model, loader(case.kind), verbose=False)
        if case.resumes:
            found = {"saved": save.facts, "resumed": facts(model, trainer.callbacks)}  # type: ignore[attr-defined]
            found["resumed_outputs"] = case.outputs(model).tolist()
        elif not weights_only:
            trainer.save_checkpoint(case.path)
    return {"outputs": case.outputs(load_compressed(case.path, case.build())).tolist(), **found}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
    for case in CASES:
        if not names or case.name in names:
            expected[case.name] = write(case)
            print(f"{case.name}: {(FOLDER / case.path).stat().st_size:,} bytes")
    EXPECTED.write_text(json.dumps({case.name: expected[case.name] for case in CASES if case.name in expected}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
