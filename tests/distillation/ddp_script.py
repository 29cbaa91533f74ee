"""Two processes on the CPU, as `strategy="ddp"` launches them; each saves what it ended with."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.distillation.nets import bits, dataset, loader, trainer, with_features


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "GPU available but not used")
    warnings.filterwarnings("ignore", ".*teacher's accuracy is near chance")
    # Lightning's combined loader asks torch's pytree in a way that torch has deprecated.
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    torch.set_num_threads(1)
    module = with_features()
    run = trainer(devices=2, strategy="ddp", max_epochs=2)
    torch.manual_seed(run.global_rank)  # ranks that draw differently must still end equal
    before, teacher_before = bits(module), bits(module.teacher)
    run.fit(module, loader(32), loader(32))
    accuracy = float(run.callback_metrics["val_acc"])
    x, y = dataset(32).tensors
    own = slice(run.global_rank, None, 2)
    counts = (module.eval()(x[own]).argmax(1) == y[own]).sum().float()
    torch.distributed.all_reduce(counts)
    torch.save(
        {
            "before": before,
            "after": bits(module),
            "teacher_before": teacher_before,
            "teacher_after": bits(module.teacher),
            "val_acc": accuracy,
            "val_acc_by_hand": float(counts) / 32,
        },
        folder / f"rank{run.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
