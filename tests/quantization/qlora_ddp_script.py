"""Two processes on the CPU with `QLoRA`; each saves what it ended with."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_compress import QLoRA, QuantizationAwareTraining, WeightOnly, merge_adapters
from tests.quantization.test_qlora import Held
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer


def state(module: Any) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders")
    warnings.filterwarnings("ignore", "The dirpath has changed")
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
    warnings.filterwarnings("ignore", "Checkpoint directory")
    # The modules of these tests log without `sync_dist`.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, held = Classifier(), Held()
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    options: dict[str, Any] = {"devices": 2, "strategy": "ddp", "enable_checkpointing": True}
    trainer = quiet_trainer(max_epochs=2, callbacks=[QLoRA(rank=2), held, save], **options)
    # Each rank has a random state and a model of its own: those of the first rank count.
    torch.manual_seed(100 + trainer.global_rank)
    trainer.fit(module, TinyData(samples=48))
    again = Classifier()
    quiet_trainer(max_epochs=2, callbacks=[QLoRA(rank=2)], **{**options, "enable_checkpointing": False}).fit(
        again, TinyData(samples=48), ckpt_path=folder / "epoch=0.ckpt", weights_only=True
    )
    torch.manual_seed(0)
    few = Classifier()
    quiet_trainer(
        max_epochs=1,
        callbacks=[QuantizationAwareTraining(WeightOnly(4, 8))],
        **{**options, "enable_checkpointing": False},
    ).fit(few, TinyData(samples=48))
    found = {
        "trained": state(module),
        "resumed": state(again),
        "merged": state(merge_adapters(module)),
        "held": sorted(held.names),
        "few bits": state(few),
    }
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
