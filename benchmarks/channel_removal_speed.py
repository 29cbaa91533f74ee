"""Times the removal of channels and its gain: the plan, the cut, a training step afterwards, latency.

Networks of three kinds in usual sizes, with random weights: a ResNet-50 and a vision transformer of 12 layers and width
384 on pictures of 224x224, and an LSTM. What is compared takes turns, and each ratio is taken within a turn: a busy
moment of the machine falls on both. With one thread the CPU time of that thread counts, which other processes hardly
disturb; with two it is wall time, so those rows want a quiet machine.

Run it with `python benchmarks/channel_removal_speed.py` (half an hour; `--networks lstm --batch-sizes 1 --rounds 1
--step-rounds 1 --steps 3` for a quick look).
"""

from __future__ import annotations

import argparse
import copy
import logging
import random
import statistics
import threading
import time
import warnings
from collections.abc import Callable

import lightning as L
import torch
from distillation_speed import SKIPPED, Plain, Turn
from pruning_speed import quartiles, resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from lightning_compress import ChannelPruning, OneShot, RemovalPlan, plan_removal, remove_channels_
from lightning_compress.report.macs import count_macs

FRACTIONS = (0.5, 0.25)
CALLS_SECONDS = 0.3  # of a turn, at least


# The networks.


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return F.relu(self.norm3(self.conv3(inner)) + self.skip(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            layers.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        # Its own `head_dim` and -1 for the heads, so that some of them can leave.
        q, k, v = self.qkv(x).reshape(batch, length, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.feed(self.norm2(x))


class VisionTransformer(nn.Module):
    """12 layers of width 384 and 6 heads on 196 patches: a ViT-S/16 without its class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 384, 16, 16)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 196, 384))
        self.layers = nn.Sequential(*(Layer(384, 6) for _ in range(12)), nn.LayerNorm(384))
        self.head = nn.Linear(384, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x).flatten(2).transpose(1, 2) + self.positions).mean(1))


class Recurrent(nn.Module):
    """Two LSTM layers of 512 units over 64 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(128, 512, 2, batch_first=True)
        self.head = nn.Linear(512, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet50": (resnet50, (3, 224, 224)),
    "vit": (VisionTransformer, (3, 224, 224)),
    "lstm": (Recurrent, (64, 128)),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().eval()


def inputs_of(name: str, batch_size: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(batch_size, *NETWORKS[name][1])


# Planning and cutting.


def plan_table(names: list[str], threads: int, rounds: int) -> str:
    torch.set_num_threads(threads)
    lines = [
        f"| {count_of(threads)} | Weights (M) | MACs (G) | Plan, CPU (s) | Wall (s) "
        "| Cut, with AdamW's moments, CPU (s) | Wall (s) |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        whole, x = build(name), inputs_of(name, 1)
        plans, cuts = list[tuple[float, float]](), list[tuple[float, float]]()
        for _ in range(rounds):
            model = copy.deepcopy(whole)
            plan, taken = clocked(lambda model=model, x=x: plan_removal(model, x, macs=0.5))
            plans.append(taken)
            optimizer = torch.optim.AdamW(model.parameters())
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            cuts.append(
                clocked(lambda model=model, plan=plan, used=optimizer: remove_channels_(model, plan, [used]))[1]
            )
        weights, macs = sum(parameter.numel() for parameter in whole.parameters()), plan.before.macs
        lines.append(f"| {name} | {weights / 1e6:.1f} | {macs / 1e9:.2f} | {spans(plans, 2)} | {spans(cuts, 3)} |")
    torch.set_num_threads(1)
    return "\n".join(lines)


def count_of(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def clocked(run: Callable[[], RemovalPlan | None]) -> tuple[RemovalPlan | None, tuple[float, float]]:
    """What ``run`` gives, and the seconds that it took by the thread's CPU and by the wall."""
    wall, cpu = time.perf_counter(), time.thread_time()
    given = run()
    return given, (time.thread_time() - cpu, time.perf_counter() - wall)


def spans(taken: list[tuple[float, float]], digits: int) -> str:
    clocks = ([pair[clock] for pair in taken] for clock in (0, 1))
    return " | ".join(
        f"{statistics.median(seconds):.{digits}f} ({min(seconds):.{digits}f} to {max(seconds):.{digits}f})"
        for seconds in clocks
    )


# A training step after the cut.


def small() -> nn.Module:
    """What ChannelPruning makes of the network, built before the fit."""
    torch.manual_seed(0)
    network = resnet()
    remove_channels_(network, plan_removal(network, torch.randn(32, 3, 32, 32), macs=0.5))
    return network


def whole() -> nn.Module:
    torch.manual_seed(0)
    return resnet()


SMALL, CUT = "the small network, plain", "ChannelPruning, after its removal"
ARMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[L.Callback]]]] = {
    SMALL: (small, list),
    "the small network, plain, once more": (small, list),
    CUT: (whole, lambda: [ChannelPruning(macs=0.5, schedule=OneShot())]),
    "the whole network, plain": (whole, list),
}


def steps_in_turn(count: int, seed: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step of each arm, by the wall and by its thread's CPU."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(10, (32,)))
    turns = {arm: Turn() for arm in ARMS}
    shapes: dict[str, list[torch.Size]] = {}

    def run(arm: str, turn: Turn) -> None:
        torch.set_num_threads(1)  # holds for this thread alone
        make, callbacks = ARMS[arm]
        module = Plain(make())
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=SKIPPED + count,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[turn, *callbacks()],
        )
        try:
            trainer.fit(module, DataLoader(ConcatDataset([data] * (SKIPPED + count)), 32))
        except BaseException as error:
            turn.error = error
            turn.done.release()
        shapes[arm] = [parameter.shape for parameter in module.parameters()]

    threads = []
    for arm, turn in turns.items():
        threads.append(threading.Thread(target=run, args=(arm, turn), daemon=True))
        threads[-1].start()
        turn.wait()  # its first step is about to start
    order, draw = list(turns.values()), random.Random(seed)
    for _ in range(SKIPPED + count):
        draw.shuffle(order)
        for turn in order:
            turn.go.release()
            turn.wait()
    for thread in threads:
        thread.join()
    if shapes[SMALL] != shapes[CUT]:
        raise RuntimeError("The networks that are compared must have the same widths.")
    return {arm: turn.steps[SKIPPED:] for arm, turn in turns.items()}


def step_table(rounds: int, steps: int) -> str:
    taken: dict[str, list[float]] = {arm: [] for arm in ARMS}
    ratios: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(rounds):
        found = {arm: [cpu for _, cpu in own] for arm, own in steps_in_turn(steps, seed=turn).items()}
        for arm, own in found.items():
            taken[arm] += own
            ratios[arm].append(statistics.median(a / b for a, b in zip(own, found[SMALL], strict=True)))
    lines = [
        "| Training step of a ResNet-20, batch 32 | CPU (ms) | More (ms) | To the small one | The rounds |",
        "|:--|--:|--:|--:|--:|",
    ]
    for arm, own in taken.items():
        more = statistics.median(a - b for a, b in zip(own, taken[SMALL], strict=True))
        lines.append(
            f"| {arm} | {1e3 * statistics.median(own):.2f} | {1e3 * more:.2f} | {statistics.median(ratios[arm]):.3f} "
            f"| {min(ratios[arm]):.3f} to {max(ratios[arm]):.3f} |"
        )
    return "\n".join(lines)


# Latency.


def times_in_turn(models: dict[str, nn.Module], x: Tensor, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call: by CPU with one thread, else by the wall."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        counts = {}
        for name, model in models.items():
            model(x)
            started = time.perf_counter()
            model(x)
            counts[name] = min(50, max(1, round(CALLS_SECONDS / (time.perf_counter() - started))))
        for _ in range(rounds):
            for name, model in models.items():
                taken = []
                for _ in range(counts[name]):
                    started = clock()
                    model(x)
                    taken.append(clock() - started)
                times[name].append(statistics.median(taken))
    torch.set_num_threads(1)
    return times


def shrunk(name: str, fraction: float, round_to: int | None = None) -> nn.Module:
    model = build(name)
    remove_channels_(model, plan_removal(model, inputs_of(name, 1), macs=fraction, round_to=round_to))
    return model


def latency_table(name: str, models: dict[str, nn.Module], batch_size: int, threads: int, rounds: int) -> str:
    x = inputs_of(name, batch_size)
    times = times_in_turn(models, x, threads, rounds)
    clock = "CPU (ms)" if threads == 1 else "Wall (ms)"
    lines = [
        f"| {name}, batch {batch_size}, {count_of(threads)} | Of its MACs | Of its weights "
        f"| {clock} | Of its time | Middle half | Faster |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    inputs = inputs_of(name, 1)
    base_macs, base_weights = size(models["whole"], inputs)
    for row, values in times.items():
        low, middle, high = quartiles([value / base for value, base in zip(values, times["whole"], strict=True)])
        macs, weights = size(models[row], inputs)
        lines.append(
            f"| {row} | {macs / base_macs:.3f} | {weights / base_weights:.3f} | {1e3 * statistics.median(values):.1f} "
            f"| {middle:.3f} | {low:.3f} to {high:.3f} | {1 / middle:.2f}x |"
        )
    return "\n".join(lines)


def size(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Multiply-accumulates and parameters."""
    return count_macs(model, x)[0], sum(parameter.numel() for parameter in model.parameters())


def budget_table(names: list[str], repeats: int, rounds: int) -> str:
    """Whether a budget of half the time is met, when it is measured anew."""
    lines = [
        "| `latency=0.5`, batch 1, one thread | The plan says | Measured anew, CPU | By the wall | Of its MACs "
        "| Planned in (s) |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for name in names:
        whole, x = build(name), inputs_of(name, 1)
        for _ in range(repeats):
            model = copy.deepcopy(whole)
            plan, (_, seconds) = clocked(lambda model=model, x=x: plan_removal(model, x, latency=0.5))
            remove_channels_(model, plan)
            cpu, wall = ratios_by_both_clocks(whole, model, x, rounds)
            macs = plan.after.macs / plan.before.macs
            lines.append(
                f"| {name} | {plan.latency:.3f} | {statistics.median(cpu):.3f} | {statistics.median(wall):.3f} "
                f"| {macs:.3f} | {seconds:.1f} |"
            )
    return "\n".join(lines)


def ratios_by_both_clocks(whole: nn.Module, model: nn.Module, x: Tensor, rounds: int) -> tuple[list[float], ...]:
    found: tuple[list[float], list[float]] = [], []
    with torch.inference_mode():
        for turn in range(10 * rounds + 2):
            taken = []
            for network in (whole, model):
                cpu, wall = time.thread_time(), time.perf_counter()
                network(x)
                taken.append((time.thread_time() - cpu, time.perf_counter() - wall))
            if turn >= 2:  # warm by then
                for clock, ratios in enumerate(found):
                    ratios.append(taken[1][clock] / taken[0][clock])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="What removing channels takes, costs and gains.")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="of plans and of latency")
    parser.add_argument("--step-rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    print(f"{arguments.rounds} rounds, {arguments.step_rounds} of {arguments.steps} steps")
    for threads in arguments.threads:
        print(f"\n{plan_table(arguments.networks, threads, arguments.rounds)}", flush=True)
    if 1 in arguments.threads:
        if arguments.step_rounds:
            print(f"\n{step_table(arguments.step_rounds, arguments.steps)}", flush=True)
        print(f"\n{budget_table(arguments.networks, min(3, arguments.rounds), arguments.rounds)}", flush=True)
    for name in arguments.networks:
        models = {"whole": build(name)}
        models |= {f"macs={fraction}": shrunk(name, fraction) for fraction in FRACTIONS}
        models["macs=0.5, round_to=1"] = shrunk(name, 0.5, round_to=1)
        for batch_size in arguments.batch_sizes:
            for threads in arguments.threads:
                print(f"\n{latency_table(name, models, batch_size, threads, arguments.rounds)}", flush=True)


if __name__ == "__main__":
    main()
