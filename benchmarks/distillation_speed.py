"""Times distillation beside a LightningModule that does the same by hand.

Soft targets and the MSE of features behind a regressor, with a teacher of ten times the student's weights. All fits run
at once, each in a thread of its own, and take turns step by step, in random order: a busy moment of the machine falls
on all of them. Each ratio is taken between neighbouring steps; a round, which starts all fits anew, gives the median of
its steps, the tables the median of the rounds. As one thread does all the work of a fit, its own CPU time tells more
than the clock, so both are given. The same arm once more shows what is noise. Networks that take no time leave what is
Lightning's and ours.

Run it with `python benchmarks/distillation_speed.py` (some three minutes; `--rounds 1` for a quick look). With glibc,
set MALLOC_ARENA_MAX=1, MALLOC_MMAP_THRESHOLD_=1000000000 and MALLOC_TRIM_THRESHOLD_=1000000000 before it starts: steps
then use their memory again, and fits of the same thing differ by a twentieth instead of a quarter.
"""

from __future__ import annotations

import argparse
import logging
import random
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from lightning_compress import Distillation, DistillationModule, FeatureMSE, SoftTarget
from lightning_compress.distillation.teacher import fingerprint

SKIPPED = 5  # steps of a fit at its start, which warm up
TASK, SOFT, FEATURE, TEMPERATURE = 0.25, 0.75, 0.25, 4.0


class Network(nn.Module):
    """Convolutions with BatchNorm, and a linear layer."""

    def __init__(self, width: int, depth: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1)]
        for _ in range(depth):
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, 1, 1, bias=False)]
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Plain(L.LightningModule):
    """A module that exists, for the callback."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch[0]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


class ByHand(Plain):
    """What a careful user writes: hooks, a regressor, a frozen teacher beside the module tree, and as many logs."""

    def __init__(self, student: Network, teacher: Network) -> None:
        super().__init__(student)
        self.__dict__["teacher"] = teacher.requires_grad_(False).eval()
        self.regressor = nn.Conv2d(student.head.in_features, teacher.head.in_features, 1)
        self.features: dict[str, Tensor] = {}
        student.features.register_forward_hook(self.keep("student"))
        teacher.features.register_forward_hook(self.keep("teacher"))

    def keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self.features[name] = output

        return hook

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        student_logits = self.student(x)
        with torch.no_grad():
            teacher_logits = self.teacher(x)
        pair = [F.log_softmax(logits / TEMPERATURE, -1) for logits in (student_logits, teacher_logits)]
        terms = {
            "task": F.cross_entropy(student_logits, y),
            "soft_target": F.kl_div(*pair, reduction="batchmean", log_target=True) * TEMPERATURE**2,
            "feature_mse": F.mse_loss(self.regressor(self.features["student"]), self.features["teacher"]),
        }
        weights = {"task": TASK, "soft_target": SOFT, "feature_mse": FEATURE}
        weighted = {name: weights[name] * value for name, value in terms.items()}
        loss = sum(weighted.values())
        values = {f"train_{name}": value.detach() for name, value in terms.items()}
        values |= {f"train_{name}_weighted": value.detach() for name, value in weighted.items()}
        self.log_dict(values, batch_size=len(x))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(x))
        self.features.clear()
        return loss


class Turn(Callback):
    """Holds a fit at each step until it is its turn, and notes what the step took."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.started: tuple[float, float] | None = None
        self.steps: list[tuple[float, float]] = []
        self.error: BaseException | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        self.end()
        self.go.acquire()
        self.started = time.perf_counter(), time.thread_time()

    def on_train_end(self, *_: Any) -> None:
        self.end()

    def wait(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        wall, cpu = time.perf_counter(), time.thread_time()
        if self.started is not None:
            self.steps.append((wall - self.started[0], cpu - self.started[1]))
        self.done.release()


Fit = tuple[L.LightningModule, list[Callback]]
Make = Callable[[Network, Network], Fit]


def losses() -> list[Any]:
    return [SoftTarget(TEMPERATURE, weight=SOFT), FeatureMSE("features", "features", weight=FEATURE)]


def by_hand(student: Network, teacher: Network) -> Fit:
    return ByHand(student, teacher), []


def module(**options: Any) -> Make:
    return lambda student, teacher: (DistillationModule(student, teacher, losses(), task_weight=TASK, **options), [])


def callback(student: Network, teacher: Network) -> Fit:
    return Plain(student), [Distillation(teacher, losses(), task_weight=TASK, student="student")]


ARMS: dict[str, Make] = {
    "by hand": by_hand,
    "by hand, once more": by_hand,
    "DistillationModule": module(),
    "Distillation, the callback": callback,
}
OPTIONS: dict[str, Make] = {
    "DistillationModule": module(),
    "with log_gradient_share, at every step": module(log_gradient_share=True),
    "with teacher_dtype='bfloat16'": module(teacher_dtype="bfloat16"),
}


@dataclass
class Setting:
    """Networks and pictures of a table."""

    widths: tuple[int, int]
    depth: int = 3
    size: int = 32
    batch: int = 32


def steps_in_turn(
    arms: dict[str, Make], setting: Setting, count: int, seed: int
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step of each arm, by the wall and by its thread's CPU."""
    turns = {arm: Turn() for arm in arms}
    shape = (setting.batch, 3, setting.size, setting.size)
    data = TensorDataset(torch.randn(shape), torch.randint(10, (setting.batch,)))

    def run(make: Make, turn: Turn) -> None:
        torch.set_num_threads(1)  # holds for this thread alone
        module, callbacks = make(*(Network(width, setting.depth) for width in setting.widths))
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=SKIPPED + count,
            log_every_n_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[turn, *callbacks],
        )
        try:
            trainer.fit(module, DataLoader(ConcatDataset([data] * 50), setting.batch))
        except BaseException as error:
            turn.error = error
            turn.done.release()

    threads = []
    for arm, turn in turns.items():
        threads.append(threading.Thread(target=run, args=(arms[arm], turn), daemon=True))
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
    return {arm: turn.steps[SKIPPED:] for arm, turn in turns.items()}


def table(title: str, arms: dict[str, Make], setting: Setting, rounds: int, steps: int) -> str:
    taken: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    ratios: dict[str, list[tuple[float, float]]] = {arm: [] for arm in arms}
    base = next(iter(arms))
    for turn in range(rounds):
        found = steps_in_turn(arms, setting, steps, seed=turn)
        for arm, own in found.items():
            pairs = [(a / c, b / d) for (a, b), (c, d) in zip(own, found[base], strict=True)]
            ratios[arm].append(medians(pairs))
            taken[arm] += own
    lines = [
        f"| {title} | CPU (ms) | More (ms) | To {base} | The rounds | Wall (ms) | To {base} |",
        "|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for arm in arms:
        wall, cpu = medians(taken[arm])
        more = statistics.median(a[1] - b[1] for a, b in zip(taken[arm], taken[base], strict=True))
        by_wall, by_cpu = ([ratio[clock] for ratio in ratios[arm]] for clock in (0, 1))
        lines.append(
            f"| {arm} | {1e3 * cpu:.2f} | {1e3 * more:.2f} | {statistics.median(by_cpu):.3f} | {min(by_cpu):.3f} to "
            f"{max(by_cpu):.3f} | {1e3 * wall:.2f} | {statistics.median(by_wall):.3f} |"
        )
    return "\n".join(lines)


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def fingerprint_seconds(megabytes: int = 100) -> list[float]:
    """CPU seconds of one fingerprint of a teacher of that size; a fit takes two."""
    side = 512
    teacher = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(round(megabytes * 1e6 / 4 / side**2))))
    times = []
    for _ in range(5):
        started = time.thread_time()
        fingerprint(teacher)
        times.append(time.thread_time() - started)
    return times


def parameters(width: int, depth: int) -> int:
    return sum(parameter.numel() for parameter in Network(width, depth).parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="What distillation costs.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    setting = Setting(widths=(16, 52))
    small, large = (parameters(width, setting.depth) for width in setting.widths)
    print(f"{arguments.rounds} rounds of {arguments.steps} steps; student {small:,} weights, teacher {large:,}")
    title = f"Training step of a CNN, teacher {large / small:.1f} times the student, batch {setting.batch}"
    print(f"\n{table(title, ARMS, setting, arguments.rounds, arguments.steps)}", flush=True)
    tiny = Setting(widths=(1, 2), depth=1, size=2, batch=2)
    print(f"\n{table('Networks that take no time', ARMS, tiny, arguments.rounds, arguments.steps)}", flush=True)
    title = "Options, on a quarter of the pictures' area"
    print(
        f"\n{table(title, OPTIONS, Setting((16, 52), size=16, batch=16), arguments.rounds, arguments.steps)}",
        flush=True,
    )
    times = fingerprint_seconds()
    print(
        f"\nFingerprint of a teacher of 100 MB: {1e3 * statistics.median(times):.0f} ms of CPU "
        f"({1e3 * min(times):.0f} to {1e3 * max(times):.0f}), twice in a fit."
    )


if __name__ == "__main__":
    main()
