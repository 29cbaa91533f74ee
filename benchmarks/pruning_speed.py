"""Times pruning: a training step with masks on, one mask update, memory over many updates.

Step: short fits take turns, round after round. Timed are the steps from the window on, mask updates included, and each
ratio is taken within a round. Update: all arms select on the same scores, in turns; peak memory is the process's own,
beyond what was held before, so that part needs Linux.

Run it with `python benchmarks/pruning_speed.py` (some ten minutes; `--step-rounds 1 --sizes 1 10` for a quick look).
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import ScheduledPruning, Window
from lightning_compress.pruning.pruner import Pruner
from lightning_compress.pruning.recipe import make_recipe
from lightning_compress.targets import Scope, Targets

STEPS, SKIPPED = 30, 6  # of a fit; the first are dense and warm up


# A training step.


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


def resnet() -> nn.Module:
    """ResNet-20 for 32x32 images."""
    sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(
        stem, *(Block(*size) for size in sizes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    )


class Attention(nn.Module):
    """Self-attention of plain Linear layers: Lightning's ModelPruning can't prune nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class Transformer(nn.Module):
    """Four layers of width 128 over 64 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(48, 128)
        self.layers = nn.Sequential(*(Layer(128, 4) for _ in range(4)))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(x, 4).flatten(2).transpose(1, 2)
        return self.head(self.layers(self.embed(patches)).mean(1))


class Classifier(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Clock(Callback):
    """Seconds from the start of one step to the start of the next, other callbacks included."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_train_end(self, *_: Any) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        return (self.marks[-1] - self.marks[SKIPPED]) / (len(self.marks) - 1 - SKIPPED)


def time_hooks_(callback: Callback) -> list[float]:
    """Let ``callback`` note the seconds that it spends in its hooks: what it adds, whatever else the machine does."""
    spent: list[float] = []

    def timed(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> None:
            started = time.perf_counter()
            hook(*arguments)
            spent.append(time.perf_counter() - started)

        return call

    for name in ("on_train_batch_start", "on_before_optimizer_step", "_on_optimizer_step", "on_train_batch_end"):
        if hasattr(callback, name):
            setattr(callback, name, timed(getattr(callback, name)))
    return spent


def lightnings(network: nn.Module) -> Callback:
    """ModelPruning with the same weights; its masks are on from the first epoch's end, and grow once an epoch."""
    layers = [module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(layer, "weight") for layer in layers],
        amount=0.4,
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
    )


def scheduled(every_n_steps: int) -> Callable[[nn.Module], Callback]:
    window = Window(SKIPPED - 1, STEPS - 1, unit="step", every_n_steps=every_n_steps)
    return lambda network: ScheduledPruning("magnitude", 0.9, window=window)


ARMS: dict[str, Callable[[nn.Module], Callback] | None] = {
    "dense": None,
    "ScheduledPruning, masks grow every 10 steps": scheduled(10),
    "ScheduledPruning, masks grow every step": scheduled(1),
    "Lightning's ModelPruning": lightnings,
}


def step_seconds(build: Callable[[], nn.Module], arm: str, batch_size: int) -> tuple[float, float]:
    """Seconds of a step, and of those the seconds in our callback's hooks."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(STEPS * batch_size, 3, 32, 32), torch.randint(10, (STEPS * batch_size,)))
    network, clock = build(), Clock()
    callbacks = [make(network)] if (make := ARMS[arm]) else []
    spent = time_hooks_(callbacks[0]) if "Scheduled" in arm else []
    L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        limit_train_batches=SKIPPED - 1,  # short epochs, as ModelPruning prunes when one ends
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *callbacks],
    ).fit(Classifier(network), DataLoader(data, batch_size))
    return clock.seconds(), sum(spent) / STEPS


def step_table(name: str, build: Callable[[], nn.Module], batch_size: int, rounds: int) -> str:
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    hooks: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(rounds):
        for arm in ARMS:
            step, in_hooks = step_seconds(build, arm, batch_size)
            times[arm].append(step)
            hooks[arm].append(in_hooks)
    weights = sum(parameter.numel() for parameter in build().parameters())
    lines = [
        f"| Training step of {name}, {weights / 1e6:.2f} M weights, batch {batch_size} | Median (ms) | To dense "
        "| Middle half | Of it in our hooks (ms) | That to dense |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for arm, values in times.items():
        low, middle, high = quartiles([value / base for value, base in zip(values, times["dense"], strict=True)])
        lines.append(
            f"| {arm} | {1e3 * statistics.median(values):.1f} | {middle:.3f} | {low:.3f} to {high:.3f} "
            + ("|  |  |" if "Scheduled" not in arm else _share(hooks[arm], times["dense"]))
        )
    return "\n".join(lines)


def _share(hooks: list[float], dense: list[float]) -> str:
    median = statistics.median(hooks)
    return f"| {1e3 * median:.2f} | {1 + median / statistics.median(dense):.4f} |"


# A mask update.


def stack(millions: int) -> nn.Module:
    """Linear layers with so many million weights in all, the larger half of them in one layer."""
    side = int((millions * 1e6 / 2) ** 0.5) // 32 * 32
    small = int((millions * 1e6 / 16) ** 0.5) // 32 * 32
    torch.manual_seed(0)
    layers = [nn.Linear(side, side, bias=False), *(nn.Linear(small, small, bias=False) for _ in range(8))]
    return nn.Sequential(*layers)


def update(
    model: nn.Module,
    sparsity: float | None,
    scope: Scope = "global",
    n_m: str | None = None,
    method: str = "l1_unstructured",
) -> Callable[[], Any]:
    pruner = Pruner(make_recipe(method, sparsity, scope, Targets(), None, 1.0, n_m, 0, 2.0), model, {})
    dense = pruner.masks

    def run() -> Any:
        ranked = {name: pruner.plan.method.scores(weight) for name, weight in pruner.weights.items()}
        pruner.plan.grow(ranked, dense, 1.0)

    return run


def kthvalue(model: nn.Module) -> Callable[[], Any]:
    """Scores in one vector and their k-th value: the threshold alone, no masks yet."""

    def run() -> Any:
        scores = torch.cat([layer.weight.detach().abs().flatten() for layer in model])
        torch.kthvalue(scores, int(0.9 * scores.numel()))

    return run


def torchs(model: nn.Module) -> Callable[[], Any]:
    layers = [(layer, "weight") for layer in model]

    def run() -> Any:
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.9)
        for layer, name in layers:
            # Back to what it was, without the copies that prune.remove makes.
            weight = layer._parameters.pop(f"{name}_orig")
            del layer._buffers[f"{name}_mask"], layer.__dict__[name]
            layer._forward_pre_hooks.clear()
            layer.register_parameter(name, weight)

    return run


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """What ``run`` holds at most, beyond what the process held before; None where the system doesn't tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists():
        return None
    gc.collect()
    reset.write_text("5")
    before = _status(status, "VmRSS")
    run()
    return _status(status, "VmHWM") - before


def _status(path: Path, name: str) -> int:
    [line] = [line for line in path.read_text().splitlines() if line.startswith(name)]
    return 1024 * int(line.split()[1])


def update_table(millions: int, rounds: int) -> str:
    model = stack(millions)
    weights = sum(layer.weight.numel() for layer in model)
    arms = {
        "torch.kthvalue of the flattened scores": kthvalue(model),
        "global, 90 %": update(model, 0.9),
        "by layer, 90 %": update(model, 0.9, "layer"),
        "global by LAMP, 90 %": update(model, 0.9, method="lamp"),
        "2:4": update(model, None, n_m="2:4"),
        "torch's global_unstructured, 90 %": torchs(model),
    }
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    peaks = {arm: peak_bytes(run) for arm, run in arms.items()}  # also warms up
    for _ in range(rounds):
        for arm, run in arms.items():
            started = time.perf_counter()
            run()
            times[arm].append(time.perf_counter() - started)
    lines = [
        f"| Masks of {weights / 1e6:.1f} M weights | Median (s) | ns a weight | To kthvalue | Middle half "
        "| Peak memory to weights |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    base = times["torch.kthvalue of the flattened scores"]
    for arm, values in times.items():
        low, middle, high = quartiles([value / other for value, other in zip(values, base, strict=True)])
        median, peak = statistics.median(values), peaks[arm]
        held = "-" if peak is None else f"{peak / (4 * weights):.2f}"
        lines.append(
            f"| {arm} | {median:.3f} | {1e9 * median / weights:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} | {held} |"
        )
    return "\n".join(lines)


def memory_over_events(events: int) -> str:
    model = stack(10)
    pruner = Pruner(make_recipe("l1_unstructured", 0.9, "global", Targets(), None, 1.0, None, 0, 2.0), model, {})
    held = []
    for event in range(events):
        pruner.grow_((event + 1) / events, event)
        pruner.apply_()
        gc.collect()
        held.append(_status(Path("/proc/self/status"), "VmRSS") / 1e6)
    return f"Memory of the process after update 5, 25 and {events} on 10 M weights: " + ", ".join(
        f"{held[index - 1]:.0f} MB" for index in (5, 25, events)
    )


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values


def main() -> None:
    parser = argparse.ArgumentParser(description="What pruning costs.")
    parser.add_argument("--step-rounds", type=int, default=9)
    parser.add_argument("--update-rounds", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 10, 30, 100], help="millions of weights")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)

    print(
        f"{arguments.step_rounds} rounds of steps, {arguments.update_rounds} of updates, {arguments.threads} thread(s)"
    )
    for name, build, batch_size in (("ResNet-20", resnet, 32), ("a transformer", Transformer, 32)):
        if arguments.step_rounds:
            print(f"\n{step_table(name, build, batch_size, arguments.step_rounds)}", flush=True)
    for millions in arguments.sizes:
        print(f"\n{update_table(millions, arguments.update_rounds)}", flush=True)
    if Path("/proc/self/status").exists():
        print(f"\n{memory_over_events(50)}")


if __name__ == "__main__":
    main()
