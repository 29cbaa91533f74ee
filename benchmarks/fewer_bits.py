"""Measures language models with weights of 2 to 8 bits: bits per byte, size, speed, and the error of each layer.

The model reads Python source files byte by byte; it is trained on the standard library's own, once for each seed, and
tested on files held out. Every scheme starts from the same float weights, so differences are paired by seed. GPTQ is
calibrated on files of the training set.

Run it with `python benchmarks/fewer_bits.py > tables.md` (an hour and a half, of which training is half an hour, once:
the models are kept; a quick look: `--seeds 1 --steps 50 --windows 20 --rounds 3`).
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_compress import GPTQ, NF4, WeightOnly, load_compressed, quantize, save_compressed
from lightning_compress.quantization.numerics.scheme import Scheme

CONTEXT, BATCH, STEPS = 256, 4, 700
CALIBRATION = 16  # batches
CACHE = Path(tempfile.gettempdir()) / "lightning_compress_benchmarks"
SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages", "encodings", "pydoc_data", "turtledemo"}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: each pair of channels is turned by its own angle per place."""
    (a, b), cos, sin = x.chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class LanguageModel(nn.Module):
    """A place starts as the embeddings of its own token and of the three before it, a quarter of the width each."""

    def __init__(self, width: int = 256, layers: int = 3, heads: int = 4, vocabulary: int = 256) -> None:
        super().__init__()
        self.half = width // heads // 2
        self.embed = nn.Embedding(vocabulary, width // 4)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        speeds = 1e4 ** -(torch.arange(self.half) / self.half)
        angles = torch.outer(torch.arange(tokens.shape[1]), speeds)
        own = self.embed(tokens)
        x = torch.cat([F.pad(own, (0, 0, back, 0))[:, : tokens.shape[1]] for back in range(4)], dim=-1)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))


class Training(L.LightningModule):
    """Cross-entropy of the next token, AdamW over what may learn, one cycle of the learning rate."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> dict[str, object]:
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: L.LightningModule, batches: list[Tensor], callbacks: list[L.Callback] | None = None) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))


def source_files(part: str) -> Tensor:
    """Bytes of the standard library's files; a hash of each one's place says whether it is held out, as a tenth is."""
    root = Path(sysconfig.get_path("stdlib"))
    places = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    held_out = {place: hashlib.sha256(place.as_posix().encode()).digest()[0] < 26 for place in places}
    selected = [
        place for place in places if not SKIPPED & set(place.parts) and held_out[place] == (part == "validation")
    ]
    return torch.frombuffer(bytearray(b"".join((root / place).read_bytes() for place in selected)), dtype=torch.uint8)


def drawn(text: Tensor, count: int, seed: int) -> Tensor:
    """``(count, CONTEXT + 1)`` tokens from places drawn at random."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=torch.Generator().manual_seed(seed))
    return text[starts + torch.arange(CONTEXT + 1)].long()


def spread(text: Tensor, count: int) -> Tensor:
    """``(count, CONTEXT + 1)`` tokens from places evenly apart."""
    starts = torch.linspace(0, len(text) - CONTEXT - 1, count).long()[:, None]
    return text[starts + torch.arange(CONTEXT + 1)].long()


@torch.inference_mode()
def bits_per_byte(model: nn.Module, tokens: Tensor) -> float:
    model.eval()
    losses = [
        F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        for batch in tokens.split(BATCH)
    ]
    return sum(losses) / tokens[:, 1:].numel() / math.log(2)


def trained(seed: int, cache: Path, steps: int = STEPS) -> LanguageModel:
    """The language model of this seed, out of the cache where it is there."""
    L.seed_everything(seed, verbose=False)
    model, file = LanguageModel(), cache / f"language_model_{steps}_{seed}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        text = source_files("train")
        fit(Training(model, lr=3e-3), list(drawn(text, steps * BATCH, seed).split(BATCH)))
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model.eval()


# The schemes.

FLOAT = "float32"
SCHEMES: dict[str, Scheme] = {
    "int8, a scale per channel": WeightOnly(),
    "int4, a scale per channel": WeightOnly(bits=4, group_size=None),
    "int4, groups of 128": WeightOnly(bits=4, group_size=128),
    "int4, groups of 32": WeightOnly(bits=4, group_size=32),
    "int4, groups of 128, asymmetric": WeightOnly(bits=4, group_size=128, symmetric=False),
    "NF4, blocks of 64": NF4(block_size=64),
    "GPTQ, int4, groups of 128": GPTQ(bits=4, group_size=128),
    "GPTQ, int4, groups of 32": GPTQ(bits=4, group_size=32),
    "GPTQ, int4, groups of 128, asymmetric": GPTQ(bits=4, group_size=128, symmetric=False),
    "GPTQ, int4, groups of 128, activation order": GPTQ(bits=4, group_size=128, activation_order=True),
    "int3, groups of 128": WeightOnly(bits=3, group_size=128),
    "int3, groups of 32": WeightOnly(bits=3, group_size=32),
    "GPTQ, int3, groups of 128": GPTQ(bits=3, group_size=128),
    "GPTQ, int3, groups of 32": GPTQ(bits=3, group_size=32),
    "int2, groups of 128": WeightOnly(bits=2, group_size=128),
    "int2, groups of 32": WeightOnly(bits=2, group_size=32),
    "GPTQ, int2, groups of 128": GPTQ(bits=2, group_size=128),
    "GPTQ, int2, groups of 32": GPTQ(bits=2, group_size=32),
    "GPTQ, int2, groups of 32, asymmetric": GPTQ(bits=2, group_size=32, symmetric=False),
}


def quantized(model: nn.Module, scheme: Scheme | None, calibration: Tensor) -> nn.Module:
    if not isinstance(scheme, GPTQ):
        return quantize(model, scheme) if scheme else model
    batches = calibration.split(BATCH)
    return quantize(model, scheme, calibration=batches, calibration_batches=len(batches))


def changed_layers(model: nn.Module, small: nn.Module) -> dict[str, nn.Linear]:
    """The float layers whose weights are no parameters any more."""
    left = dict(small.named_parameters())
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in layers.items() if f"{name}.weight" not in left}


def through_a_file(model: nn.Module) -> tuple[nn.Module, int]:
    """What a fresh model becomes when it loads the file that ``model`` is saved to, and the file's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.ckpt"
        save_compressed(model, str(file))
        return load_compressed(str(file), LanguageModel()).eval(), file.stat().st_size


def bytes_in_theory(model: nn.Module, small: nn.Module, scheme: Any) -> float:
    """``bits / 8`` of a weight, 2 of a group's scale, 4 of every number that stays float.

    A group of NF4 takes 1 byte for its scale and 256 of them share 8, an asymmetric one as many bits more as a code.
    """
    total = 4.0 * sum(parameter.numel() for parameter in model.parameters())
    for layer in changed_layers(model, small).values():
        bits, size = (4, scheme.block_size) if isinstance(scheme, NF4) else (scheme.bits, scheme.group_size)
        groups = layer.out_features * math.ceil(layer.in_features / (size or layer.in_features))
        a_group = 1 + 8 / 256 if isinstance(scheme, NF4) else 2 + (0 if scheme.symmetric else bits / 8)
        total += layer.weight.numel() * (bits / 8 - 4) + groups * a_group
    return total


# Error of each layer.


@torch.inference_mode()
def layer_errors(model: nn.Module, small: nn.Module, tokens: Tensor) -> dict[str, float]:
    """``||x W^T - x Wq^T|| / ||x W^T||`` of every quantized layer, ``x`` being what the float model feeds it."""
    errors: dict[str, float] = {}

    def compare(name: str, layer: nn.Linear, x: Tensor, y: Tensor) -> None:
        bias = 0.0 if layer.bias is None else layer.bias
        errors[name] = float((small.get_submodule(name)(x) - y).norm() / (y - bias).norm())

    hooks = [
        layer.register_forward_hook(lambda layer, args, y, name=name: compare(name, layer, args[0], y))
        for name, layer in changed_layers(model, small).items()
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return errors


# Quality and size.


class Outcome(NamedTuple):
    bits_per_byte: float
    file: int
    theory: float
    errors: dict[str, float]


def outcome(model: nn.Module, small: nn.Module, scheme: Scheme | None, held_out: Tensor) -> Outcome:
    loaded, size = through_a_file(small)
    errors = layer_errors(model, loaded, held_out[::8, :-1])
    return Outcome(bits_per_byte(loaded, held_out), size, bytes_in_theory(model, small, scheme), errors)


def interval(differences: list[float]) -> str:
    """The mean and its 95 % t-interval; bold where that excludes 0."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f}"
    half = float(student_t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    text = f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
    return f"**{text}**" if abs(mean) > half else text


def quality_table(results: dict[str, list[Outcome]]) -> str:
    lines = [
        "| Scheme | File (KB) | Theory (KB) | File to theory | Of float's file | Error of a layer | Bits per byte "
        "| More than float |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    plain = results[FLOAT]
    for row, runs in results.items():
        first, errors = runs[0], [error for run in runs for error in run.errors.values()]
        more = [run.bits_per_byte - other.bits_per_byte for run, other in zip(runs, plain, strict=True)]
        lines.append(
            f"| {row} | {first.file / 1e3:,.1f} | {first.theory / 1e3:,.1f} | {first.file / first.theory:.3f} "
            f"| {first.file / plain[0].file:.3f} | {f'{statistics.median(errors):.4f}' if errors else ''} "
            f"| {statistics.fmean(run.bits_per_byte for run in runs):.4f} | {interval(more) if row != FLOAT else ''} |"
        )
    return "\n".join(lines)


def layer_table(results: dict[str, list[Outcome]]) -> str:
    """Errors are those of the first seed's model."""
    lines = [
        "| GPTQ beside the nearest codes | Layers | Lower with GPTQ | Error, nearest: median | GPTQ: median "
        "| GPTQ to nearest: median | Smallest | Largest | Not lower | Bits per byte, all seeds: less nearest's |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|:--|--:|",
    ]
    for row in (row for row in results if f"GPTQ, {row}" in results):
        nearest, by_gptq = results[row][0].errors, results[f"GPTQ, {row}"][0].errors
        ratios = {name: by_gptq[name] / error for name, error in nearest.items()}
        worse = [f"`{name}` ({ratio:.3f})" for name, ratio in ratios.items() if ratio >= 1]
        pairs = zip(results[f"GPTQ, {row}"], results[row], strict=True)
        less = interval([run.bits_per_byte - other.bits_per_byte for run, other in pairs])
        medians = (f"{statistics.median(errors.values()):.4f}" for errors in (nearest, by_gptq, ratios))
        lines.append(
            f"| {row} | {len(ratios)} | {len(ratios) - len(worse)} | {' | '.join(medians)} "
            f"| {min(ratios.values()):.3f} | {max(ratios.values()):.3f} | {', '.join(worse) or 'none'} | {less} |"
        )
    return "\n".join(lines)


# Speed.


@torch.inference_mode()
def seconds_in_turn(models: dict[str, nn.Module], tokens: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of this thread's CPU for a forward pass: the median of each round's calls."""
    calls = max(1, min(30, 1000 // tokens.numel()))
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds + 1):  # the first warms up
        for name, model in models.items():
            taken = []
            for _ in range(calls):
                started = time.thread_time()
                model(tokens)
                taken.append(time.thread_time() - started)
            times[name].append(statistics.median(taken))
    return {name: own[1:] for name, own in times.items()}


def speed_table(models: dict[str, nn.Module], shapes: list[tuple[int, int]], rounds: int) -> str:
    found = [seconds_in_turn(models, torch.randint(256, shape), rounds) for shape in shapes]
    heads = (f" {batch} x {length}: tokens a second | To float | Middle half |" for batch, length in shapes)
    lines = [f"| Scheme |{''.join(heads)}", f"|:--|{'--:|--:|--:|' * len(shapes)}"]
    for row in models:
        cells = []
        for (batch, length), times in zip(shapes, found, strict=True):
            ratios = [base / value for value, base in zip(times[row], times[FLOAT], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            rate = batch * length / statistics.median(times[row])
            cells.append(f" {rate:,.0f} | {middle:.2f} | {low:.2f} to {high:.2f} |")
        lines.append(f"| {row} |{''.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality, size and speed of weights of few bits.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where trained models are kept (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training; fewer is a quick look")
    parser.add_argument("--windows", type=int, default=200, help="of held-out text")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    arguments = parser.parse_args()
    quiet()

    held_out = spread(source_files("validation"), arguments.windows)
    calibration = drawn(source_files("train"), CALIBRATION * BATCH, seed=1000)[:, :-1]
    results: dict[str, list[Outcome]] = {}
    models: dict[str, nn.Module] = {}  # of the first seed, to be timed; GPTQ's form is that of the nearest codes
    started = time.perf_counter()
    for seed in range(arguments.seeds):
        model = trained(seed, arguments.cache, arguments.steps)
        for row, scheme in {FLOAT: None, **SCHEMES}.items():
            small = quantized(model, scheme, calibration)
            results.setdefault(row, []).append(outcome(model, small, scheme, held_out))
            if not isinstance(scheme, GPTQ):
                models.setdefault(row, small)
            found = results[row][-1].bits_per_byte
            print(f"{time.perf_counter() - started:5.0f} s  seed {seed} {row}: {found}", file=sys.stderr, flush=True)
    print(quality_table(results), flush=True)
    print(f"\n{layer_table(results)}", flush=True)
    print(f"\n{speed_table(models, [(1, 1), (1, 32), (8, CONTEXT)], arguments.rounds)}", flush=True)


def quiet() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
