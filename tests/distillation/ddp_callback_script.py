"""`Distillation` in two processes on the CPU; each saves what it ended with."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distillation.nets import bits, trainer
from tests.distillation.test_ddp_callback import adapter, build, data


def main(kind: str, folder: Path) -> None:
    warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "GPU available but not used")
    warnings.filterwarnings("ignore", ".*teacher's accuracy is near chance")
    warnings.filterwarnings("ignore", ".*teacher is behind")
    # Lightning's combined loader asks torch's pytree in a way that torch has deprecated.
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    # The module of these tests logs without `sync_dist`.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    torch.set_num_threads(1)
    module, callback, first = build(kind)
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "callbacks": [callback, first]}
    fit = trainer(devices=2, strategy="ddp", use_distributed_sampler=False, **options)
    # Ranks that draw differently must still end equal; rank 0 draws as the single process does.
    torch.manual_seed(7 + fit.global_rank)
    fit.fit(module, data(4, fit.global_rank, 2), data(4, fit.global_rank, 2))
    found = {
        "weights": bits(module),
        "adapters": bits(callback.objective.adapters),
        "first": first.state,
        "teacher": bits(callback.objective.teacher.require()),
        "kl": float(fit.callback_metrics["val_kl"]),
        "held": adapter(fit),
    }
    torch.save(found, folder / f"rank{fit.global_rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
