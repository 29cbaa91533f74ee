"""Two processes on the CPU, as `strategy="ddp"` launches them; each saves what it ended with."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightning_compress import PostTrainingQuantization, QuantizationAwareTraining, ScheduledPruning, Window
from tests.quantization.test_qat import At, int8_weights, observers
from tests.support.data import TinyData
from tests.support.modules import Classifier, quiet_trainer


class Shuffled(TinyData):
    """Its calibration data come in another order on each rank, if the ranks' random states say so."""

    def calibration_dataloader(self) -> Any:
        return DataLoader(self.train_dataloader().dataset, batch_size=8, shuffle=True)


def main(start: float, folder: Path) -> None:
    warnings.filterwarnings("ignore", "The '\\w+_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    warnings.filterwarnings("ignore", "torch.ao.quantization is deprecated")
    warnings.filterwarnings("ignore", "Please use quant_min and quant_max")
    warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders")
    # The modules of these tests log without `sync_dist`.
    warnings.filterwarnings("ignore", "It is recommended to use `self.log")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Classifier()
    seen: dict[str, Any] = {}
    qat = QuantizationAwareTraining(window=Window(start))
    callbacks = [ScheduledPruning(sparsity=0.5), qat, At(on_train_end=lambda t, m: seen.update(observers(m)))]
    trainer = quiet_trainer(devices=2, strategy="ddp", max_epochs=2, callbacks=callbacks)
    torch.manual_seed(100 + trainer.global_rank)
    trainer.fit(module, TinyData(samples=48))
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    int8 = {str(shape): weight for shape, weight in int8_weights(module).items()}
    ptq = PostTrainingQuantization("int8_static", calibration_batches=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        other = Classifier()
    quiet_trainer(devices=2, strategy="ddp", callbacks=[ptq]).test(other, Shuffled(samples=48), verbose=False)
    found = {
        "observers": seen,
        "calibrated": ptq.quantized_model.eval()(x),
        "int8": int8,
        "outputs": module.eval()(x),
    }
    torch.save(found, folder / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(float(sys.argv[1]), Path(sys.argv[2]))
