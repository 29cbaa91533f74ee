"""Measures what quantizing 100 million weights to few bits takes, and QLoRA beside LoRA on float weights.

Run it with `python benchmarks/fewer_bits_cost.py > tables.md` (about half an hour, and an hour more where the language
models of `fewer_bits.py` aren't trained yet; a quick look: `--seeds 1 --steps 20`). Linux only: it reads `/proc/self`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
from fewer_bits import (
    BATCH,
    CACHE,
    LanguageModel,
    Training,
    bits_per_byte,
    bytes_in_theory,
    drawn,
    fit,
    interval,
    quiet,
    spread,
    trained,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import GPTQ, NF4, QLoRA, WeightOnly, quantize, save_compressed
from lightning_compress.quantization.numerics.scheme import Scheme

VOCABULARY, RATE = 16000, 5e-3
RANK, ALPHA = 8, 16.0
LORA, QLORA = "LoRA, float32 below", "QLoRA, NF4 below"
SCHEMES: dict[str, Scheme] = {
    "int8, a scale per channel": WeightOnly(),
    "int4, groups of 128": WeightOnly(bits=4, group_size=128),
    "NF4, blocks of 64": NF4(),
    "GPTQ, int4, groups of 128": GPTQ(bits=4, group_size=128),
}


def large() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(width=768, layers=12, heads=12, vocabulary=VOCABULARY)


def random_batches(count: int) -> list[Tensor]:
    return list(torch.randint(VOCABULARY, (count, 4, 257), generator=torch.Generator().manual_seed(0)))


# LoRA by hand, on float weights.


class LowRank(nn.Module):
    """``y = layer(x) + alpha / rank * B A x``; A drawn as `QLoRA` draws its own, B zero."""

    def __init__(self, layer: nn.Linear, seed: int) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.empty(RANK, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, RANK))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.a), self.b) * (ALPHA / RANK)


def with_lora_(model: LanguageModel) -> LanguageModel:
    """Under every linear layer but the head, as `QLoRA` does by default."""
    model.requires_grad_(False)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "head"]
    for seed, name in enumerate(linear):
        model.set_submodule(name, LowRank(model.get_submodule(name), seed))
    return model


def arm(row: str, model: LanguageModel) -> tuple[nn.Module, list[L.Callback]]:
    """What to train, and with which callbacks."""
    return (with_lora_(model), []) if row == LORA else (model, [QLoRA(rank=RANK, alpha=ALPHA)])


# Each in a process of its own.


def peak() -> int:
    """The process's largest resident memory until now, or since `forget_peak`; bytes."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def quantize_alone(row: str) -> dict[str, float]:
    before = peak()
    model, batches = large(), [batch[:, :-1] for batch in random_batches(16)]
    wall, cpu = time.perf_counter(), time.process_time()
    small = quantize(model, SCHEMES[row], calibration=batches if isinstance(SCHEMES[row], GPTQ) else None)
    taken = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    most, maximum = peak() - before, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert math.isclose(most, maximum, rel_tol=0.02)
    with tempfile.TemporaryDirectory() as folder:
        save_compressed(small, str(file := Path(folder) / "model.ckpt"))
        size = file.stat().st_size
    return {**taken, "peak": most, "file": size, "theory": bytes_in_theory(model, small, SCHEMES[row])}


class Clock(L.Callback):
    """CPU seconds of each step; with ``alone`` the peak of memory is that of the steps from the second on."""

    def __init__(self, alone: bool = False) -> None:
        self.alone, self.steps, self.until_first = alone, list[float](), 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.thread_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.thread_time() - self.started)
        if self.alone and len(self.steps) == 1:
            self.until_first = peak()
            forget_peak()

    def on_train_end(self, *_: Any) -> None:
        self.in_steps = peak()


def train_alone(row: str) -> dict[str, float]:
    before, clock = peak(), Clock(alone=True)
    model, callbacks = arm(row, large())
    fit(Training(model, RATE), [batch[:1] for batch in random_batches(5)], [*callbacks, clock])
    step = statistics.median(clock.steps[1:])
    return {"step": step, "until_first": clock.until_first - before, "in_steps": clock.in_steps - before}


ALONE = {**dict.fromkeys(SCHEMES, quantize_alone), LORA: train_alone, QLORA: train_alone}


def alone(row: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--alone", row, "--threads", str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    print(row, done.stdout, file=sys.stderr, flush=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def quantize_table(threads: int) -> str:
    plain = 4 * sum(parameter.numel() for parameter in large().parameters())
    lines = [
        f"| {plain / 4e6:.1f} M weights, {threads} thread{'s' if threads > 1 else ''} | Wall (s) | CPU (s) "
        "| Peak memory to float weights | File (MB) | Theory (MB) | File to theory | Of float |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in SCHEMES:
        run = alone(row, threads)
        lines.append(
            f"| {row} | {run['wall']:.1f} | {run['cpu']:.1f} | {run['peak'] / plain:.2f} | {run['file'] / 1e6:.2f} "
            f"| {run['theory'] / 1e6:.2f} | {run['file'] / run['theory']:.4f} | {run['file'] / plain:.3f} |"
        )
    return "\n".join(lines)


def memory_table(threads: int) -> str:
    plain = 4 * sum(parameter.numel() for parameter in large().parameters())
    lines = [
        f"| Training {plain / 4e6:.1f} M weights, batch 1 x 256 | Peak until the first step's end (MB) "
        "| To float weights | Peak in later steps (MB) | To float weights | CPU of a step (s) |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for row in (LORA, QLORA):
        run = alone(row, threads)
        cells = (f"{run[key] / 1e6:.0f} | {run[key] / plain:.2f}" for key in ("until_first", "in_steps"))
        lines.append(f"| {row} | {' | '.join(cells)} | {run['step']:.2f} |")
    return "\n".join(lines)


# Fine-tuning on another kind of text.


def manual(part: str) -> Tensor:
    """Python's reference manual as `help()` shows it, English with markup; a tenth of its topics is held out."""
    texts = {text: name for name, text in sorted(topics.items())}  # some texts have several names
    held_out = {text: hashlib.sha256(name.encode()).digest()[0] < 26 for text, name in texts.items()}
    selected = [text for text in texts if held_out[text] == (part == "validation")]
    return torch.frombuffer(bytearray("".join(selected).encode()), dtype=torch.uint8)


def outcomes(seed: int, cache: Path, steps: int, windows: int) -> Iterator[tuple[str, float]]:
    held_out = spread(manual("validation"), windows)
    batches = list(drawn(manual("train"), steps * BATCH, seed).split(BATCH))
    model = trained(seed, cache)
    yield "before, float32", bits_per_byte(model, held_out)
    yield "before, NF4", bits_per_byte(quantize(model, NF4()), held_out)
    for row in (LORA, QLORA):
        torch.manual_seed(seed)
        network, callbacks = arm(row, copy.deepcopy(model))
        module = Training(network, RATE)
        fit(module, batches, callbacks)
        yield row, bits_per_byte(module, held_out)


def tuning_table(results: dict[str, list[float]]) -> str:
    lines = ["| Model | Bits per byte | By seed | To LoRA |", "|:--|--:|:--|--:|"]
    for row, values in results.items():
        more = [value - other for value, other in zip(values, results[LORA], strict=True)]
        by_seed = " ".join(f"{value:.3f}" for value in values)
        lines.append(
            f"| {row} | {statistics.fmean(values):.4f} | {by_seed} | {interval(more) if row != LORA else ''} |"
        )
    return "\n".join(lines)


def step_table(cache: Path, rounds: int, steps: int) -> str:
    """Fits of a few steps take turns."""
    model, text = trained(0, cache), manual("train")
    taken: dict[str, list[float]] = {LORA: [], QLORA: []}
    for turn in range(rounds):
        batches = list(drawn(text, steps * BATCH, turn).split(BATCH))
        for row, own in taken.items():
            network, callbacks = arm(row, copy.deepcopy(model))
            clock = Clock()
            fit(Training(network, RATE), batches, [*callbacks, clock])
            own.append(statistics.median(clock.steps[1:]))
    lines = ["| Step, 2.5 M weights, batch 4 x 256 | CPU (ms) | To LoRA | The rounds |", "|:--|--:|--:|--:|"]
    for row, own in taken.items():
        ratios = [value / base for value, base in zip(own, taken[LORA], strict=True)]
        lines.append(
            f"| {row} | {1e3 * statistics.median(own):.0f} | {statistics.median(ratios):.3f} "
            f"| {min(ratios):.3f} to {max(ratios):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What weights of few bits cost, and QLoRA beside LoRA.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained models are kept (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of fine-tuning")
    parser.add_argument("--windows", type=int, default=150, help="of held-out text")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument("--threads", type=int, default=1, help="of what works on 100 million weights")
    parser.add_argument("--alone", choices=list(ALONE), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.alone:
        torch.set_num_threads(arguments.threads)
        print(json.dumps(ALONE[arguments.alone](arguments.alone)))
        return

    print(quantize_table(arguments.threads), flush=True)
    print(f"\n{memory_table(arguments.threads)}", flush=True)
    results: dict[str, list[float]] = {}
    started = time.perf_counter()
    for seed in range(arguments.seeds):
        for row, value in outcomes(seed, arguments.cache, arguments.steps, arguments.windows):
            results.setdefault(row, []).append(value)
            print(f"{time.perf_counter() - started:5.0f} s  seed {seed} {row}: {value}", file=sys.stderr, flush=True)
    print(f"\n{tuning_table(results)}", flush=True)
    print(f"\n{step_table(arguments.cache, arguments.rounds, steps=12)}", flush=True)


if __name__ == "__main__":
    main()
