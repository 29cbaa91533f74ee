"""Two processes on the CPU, as `strategy="ddp"` launches them; each saves what it ended with."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning.pytorch.callbacks import Callback
from torch.nn.parallel import DistributedDataParallel

from lightning_compress import ChannelPruning, Linear, ScheduledPruning, Window
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer
from tests.support.oracles import snapshot


class Records(Callback):
    """Weights, momenta and gradients after each batch."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.wrappers: list[Any] = []
        self.gradients: list[Any] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append({name: one.grad.clone() for name, one in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = trainer.optimizers[0].state
        momenta = {name: state[one]["momentum_buffer"].clone() for name, one in pl_module.named_parameters()}
        self.batches.append({"weights": snapshot(dict(pl_module.named_parameters())), "momenta": momenta})
        assert isinstance(trainer.strategy.model, DistributedDataParallel)
        # Kept, so that no two have the same id.
        self.wrappers.append(trainer.strategy.model)


def main(importance: str, folder: Path) -> None:
    warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    # The modules of these tests log without `sync_dist`.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Classifier()
    window = Window(2, 8, unit="step", every_n_steps=3)
    channels = ChannelPruning(macs=0.5, importance=importance, schedule=Linear(), window=window, round_to=1)
    records = Records()
    trainer = quiet_trainer(
        devices=2,
        strategy="ddp",
        max_epochs=4,
        callbacks=[ScheduledPruning(sparsity=0.5, window=Window(3, 9, unit="step")), channels, records],
    )
    torch.manual_seed(100 + trainer.global_rank)  # ranks that draw differently must still cut the same
    trainer.fit(module, TinyData(samples=48))
    found = {
        "batches": records.batches,
        "gradients": records.gradients,
        "wrappers": len({id(wrapper) for wrapper in records.wrappers}),
        "drawn": torch.rand(3),
        "numbers": [module.body.out_features, module.norm.num_features, module.head.in_features],
    }
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
