"""Times a training step under fake quantization as a ratio to the float one, and preparing; counts what is kept for
the backward pass.

The shapes are those of well-known networks, with random weights. Float and prepared network take turns step by step in
one process, on one thread, and CPU time counts; each ratio is taken within a round.

Run it with `python benchmarks/qat_cost.py` (three minutes; `--networks conv1d --rounds 5` for a quick look).
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
from pruning_speed import quartiles
from shapes.well_known import Bert, conv1d, mobilenet_v2, resnet18
from torch import Tensor, nn

from lightning_compress import QuantizationAwareTraining

now = time.process_time


def bert() -> tuple[nn.Module, Tensor]:
    return Bert(2, 384), torch.randint(30522, (4, 128))


SHAPES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet18, 8 images of 64x64": lambda: (resnet18(), torch.randn(8, 3, 64, 64)),
    "mobilenet_v2, 8 images of 64x64": lambda: (mobilenet_v2(), torch.randn(8, 3, 64, 64)),
    "conv1d, 8 sounds of 16000 samples": lambda: (conv1d(), torch.randn(8, 1, 16000)),
    "bert, 2 layers of width 384, 4 texts of 128 tokens": bert,
}


class Module(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.network(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Timed(QuantizationAwareTraining):
    """Leaves the module prepared, and knows what preparing took."""

    seconds = 0.0

    def __init__(self) -> None:
        super().__init__(convert=False)

    def _prepare(self, *args: Any) -> None:
        started = now()
        super()._prepare(*args)
        self.seconds = now() - started


def after_a_step(network: nn.Module, batch: Tensor, callbacks: list[L.Callback]) -> Module:
    module = Module(network)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, torch.utils.data.DataLoader(batch, len(batch)))
    return module.train()


def step_ms(module: Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> float:
    started = now()
    module.training_step(batch, 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    return 1e3 * (now() - started)


def kept_bytes(module: Module, batch: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward one, but for parameters and the batch."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), batch)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = module.training_step(batch, 0)
    loss.backward()
    module.zero_grad()
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def measure(make: Callable[[], tuple[nn.Module, Tensor]], rounds: int) -> list[str]:
    qat, arms = Timed(), []
    for callbacks in ([], [qat]):
        torch.manual_seed(0)
        network, batch = make()
        module = after_a_step(network, batch, callbacks)
        arms.append(partial(step_ms, module, module.configure_optimizers(), batch))
    times = [[step() for step in arms] for _ in range(rounds + 2)][2:]  # the first steps warm up
    low, middle, high = quartiles([prepared / plain for plain, prepared in times])
    plain, prepared = (statistics.median(column) for column in zip(*times, strict=True))
    kept = [kept_bytes(arm.args[0], batch) for arm in arms]
    return [
        f"{plain:.1f}",
        f"{prepared:.1f}",
        f"{middle:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{qat.seconds:.1f}",
        f"{kept[0] / 1e6:.1f}",
        f"{kept[1] / kept[0]:.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="What training for int8 costs.")
    parser.add_argument("--networks", nargs="+", help="beginnings of their names", default=[""])
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"{arguments.rounds} rounds, one thread, CPU time, torch {torch.__version__}\n")
    print(
        "| Network, batch | Step in float (ms) | Prepared (ms) | To float | Middle half | Preparing (s) "
        "| Kept for backward in float (MB) | To float |\n|:--|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name, make in SHAPES.items():
        if name.startswith(tuple(arguments.networks)):
            print(f"| {name} | {' | '.join(measure(make, arguments.rounds))} |", flush=True)


if __name__ == "__main__":
    main()
