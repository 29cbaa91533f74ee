"""Two processes on the CPU, as `strategy="ddp"` launches them; each saves what it ended with."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning.pytorch.callbacks import Callback

from lightning_compress import ScheduledPruning, Window
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer


def main(method: str, folder: Path) -> None:
    warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    # The modules of these tests log without `sync_dist`.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Classifier()
    pruning = ScheduledPruning(method, 0.7, "layer", window=Window(0, 0.8))
    events: list[Any] = []

    class Records(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            events.append({name: mask.clone() for name, mask in pruning.masks.items()})

    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=2, callbacks=[pruning, Records()])
    torch.manual_seed(100 + trainer.global_rank)  # ranks that draw differently must still prune the same
    trainer.fit(module, TinyData(samples=48))
    found = {"events": events, "weights": module.state_dict(), "drawn": torch.rand(3)}
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
