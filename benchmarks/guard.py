"""Measures what `AccuracyGuard` keeps of two networks that plain int8 breaks, beside NNCF's accuracy control.

Both are trained on handwritten digits, and then given channels whose ranges differ by a thousand to one, without a
change of what they compute: a depthwise CNN between two convolutions, a transformer in four outliers of a LayerNorm.
Equalization is off for all. 697 digits train and calibrate, 600 validate, 500 are held out for the test.

Results are appended to a file as they come, and what it holds isn't measured again:

    python benchmarks/guard.py --seeds 10
    python benchmarks/guard.py --table > benchmarks/guard.md

NNCF is left out, with a word, where it or OpenVINO isn't installed.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from defaults_networks import Transformer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_compress import AccuracyGuard, CompressionError, PostTrainingQuantization, StaticInt8
from lightning_compress.quantization import convert

MAX_DROP = 0.01
SIZES = (697, 600, 500)
EPOCHS = 40
PLAIN = StaticInt8(equalize=False, smooth=False)
GUARD, NNCF = "AccuracyGuard", "NNCF"
ARMS = ("int8", GUARD, NNCF)


def depthwise() -> nn.Module:
    """Three depthwise separable blocks behind a convolution."""
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    for into, out in ((32, 64), (64, 64), (64, 128)):
        layers += [nn.Conv2d(into, into, 3, padding=1, groups=into, bias=False), nn.BatchNorm2d(into), nn.ReLU()]
        layers += [nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


@torch.no_grad()
def spread_cnn_(net: Any, order: Tensor) -> None:
    """Multiply what the first convolution gives, by 1 to 1000, and divide it out again in the next."""
    scale = torch.logspace(0, 3, len(order))[order]
    net[1].weight *= scale
    net[1].bias *= scale
    net[3].weight /= scale[:, None, None, None]


@torch.no_grad()
def spread_transformer_(net: Any, order: Tensor) -> None:
    """The same with four outlier channels of what the LayerNorm before the second layer's wide linear layer gives."""
    scale = torch.where(order < 4, 1000.0, 1.0)
    layer = net.layers[1]
    layer.norm2.weight *= scale
    layer.norm2.bias *= scale
    layer.up.weight /= scale


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], None], int]] = {
    "depthwise CNN": (depthwise, spread_cnn_, 32),
    "transformer": (Transformer, spread_transformer_, 48),
}


class Data(L.LightningDataModule):
    """Digits, parted by the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        x, y = torch.tensor(images).float().view(-1, 1, 8, 8)[order] / 16, torch.tensor(labels)[order]
        self.parts = [TensorDataset(*part) for part in zip(x.split(SIZES), y.split(SIZES), strict=True)]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], batch_size=20)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[2], batch_size=50)


class Module(L.LightningModule):
    """One of the networks."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.net = NETWORKS[name][0]()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def _evaluate(self, batch: list[Tensor], stage: str) -> None:
        self.log(f"{stage}_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 3e-3)
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps), "interval": "step"}
        ]


def trainer(**options: Any) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(accelerator="cpu", devices=1, **quiet, **options)


@functools.lru_cache(maxsize=1)
def trained(name: str, seed: int) -> tuple[Module, Data]:
    """A network of accuracy as usual, and with ranges as they shouldn't be."""
    torch.manual_seed(seed)
    module, data = Module(name), Data(seed)
    trainer(max_epochs=EPOCHS, limit_val_batches=0).fit(module, data)
    _, spread_, width = NETWORKS[name]
    spread_(module.net, torch.randperm(width))
    return module, data


@torch.no_grad()
def macs_of(net: nn.Module) -> dict[str, int]:
    """Multiply-accumulates by layer, of one image."""
    found: dict[str, int] = {}
    handles = [
        layer.register_forward_hook(
            lambda module, _, out, path=path: found.update(
                {path: out.numel() * module.weight.numel() // len(module.weight)}
            )
        )
        for path, layer in net.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    net.eval()(torch.zeros(1, 1, 8, 8))
    for handle in handles:
        handle.remove()
    return found


def test(module: Module, data: Data, *callbacks: L.Callback) -> float:
    return trainer(callbacks=list(callbacks)).test(module, data, verbose=False)[0]["test_acc"]


def measure(name: str, seed: int, arm: str) -> dict[str, Any]:
    """One row."""
    module, data = trained(name, seed)
    row: dict[str, Any] = {"float": test(module, data)}
    started = time.perf_counter()
    if arm == NNCF:
        return row | nncf_control(module, data) | {"seconds": time.perf_counter() - started}
    ptq, callbacks = PostTrainingQuantization(PLAIN), []
    if arm == GUARD:
        callbacks = [AccuracyGuard("val_acc", MAX_DROP)]
    try:
        row["test"] = test(module, data, ptq, *callbacks)
    except CompressionError as error:
        return row | {"error": str(error)}
    record = convert.record_of(ptq.quantized_model)
    assert record is not None
    floats = {
        f"{unit['path']}.{path}".removeprefix("net").strip(".") for unit in record["units"] for path in unit["floats"]
    }
    floats |= {path.removeprefix("net").strip(".") for path in record["floats"]}
    macs = macs_of(module.net)
    row["int8"] = 1 - sum(count for path, count in macs.items() if path in floats) / sum(macs.values())
    row["floats"] = sorted(path for path in macs if path in floats)
    if callbacks:
        row["evaluations"] = int(callbacks[0].report_notes()[-1].split()[-2])
    return row | {"seconds": time.perf_counter() - started}


def nncf_control(module: Module, data: Data) -> dict[str, Any]:
    """The same by `nncf.quantize_with_accuracy_control`, on the same data."""
    import nncf
    import openvino

    net = module.net.eval()
    model = openvino.convert_model(net, example_input=torch.zeros(20, 1, 8, 8), input=[-1, 1, 8, 8])
    count = 0

    def accuracy(compiled: Any, batches: Any) -> float:
        nonlocal count
        right = [compiled(x.numpy())[0].argmax(1) == y.numpy() for x, y in batches]
        count += len(right)  # it validates single batches, too
        return float(sum(part.sum() for part in right) / sum(len(part) for part in right))

    advanced = nncf.AdvancedQuantizationParameters(disable_channel_alignment=True)
    advanced.smooth_quant_alphas = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
    torch.manual_seed(0)
    quantized = nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(list(data.train_dataloader()), lambda batch: batch[0].numpy()),
        nncf.Dataset(list(data.val_dataloader())),
        lambda compiled, batches: accuracy(compiled, batches),
        max_drop=MAX_DROP,
        drop_type=nncf.DropType.ABSOLUTE,
        advanced_quantization_parameters=advanced,
    )
    evaluations = count / len(data.val_dataloader())
    compiled = openvino.compile_model(quantized, "CPU")
    inside = total = 0
    for node in quantized.get_ops():
        if node.get_type_name() in ("Convolution", "GroupConvolution", "MatMul"):
            weight, source = node.input(1).get_source_output(), node.input_value(0).get_node()
            if weight.get_partial_shape().is_dynamic or not _is_constant(weight.get_node()):
                continue  # a product of activations
            outputs = [size.get_length() for size in list(node.get_output_partial_shape(0))[1:]]
            shape, scale = list(weight.get_shape()), 1
            for size in outputs:
                scale *= size
            product = 1
            for size in shape:
                product *= size
            macs = scale * product // outputs[0 if "Conv" in node.get_type_name() else -1]
            total += macs
            inside += macs * (source.get_type_name() == "FakeQuantize")
    return {
        "test": accuracy(compiled, list(data.test_dataloader())),
        "int8": inside / total,
        "evaluations": evaluations,
    }


def _is_constant(node: Any) -> bool:
    return node.get_type_name() == "Constant" or (
        node.get_type_name() in ("FakeQuantize", "Convert", "Multiply", "Subtract", "Reshape")
        and all(_is_constant(value.get_node()) for value in node.input_values())
    )


def table(rows: list[dict[str, Any]]) -> str:
    """What was measured, as Markdown."""
    lines = [
        f"| Network | Arm | Within {MAX_DROP:.0%} on held-out data | Falls (points): median, worst "
        "| MACs in int8: median, least | Evaluations: median | Seconds: median |",
        "|:--|:--|--:|--:|--:|--:|--:|",
    ]
    for name in NETWORKS:
        for arm in ARMS:
            found = [row for row in rows if (row["network"], row["arm"]) == (name, arm)]
            done = [row for row in found if "test" in row]
            if not found:
                continue
            falls = [100 * (row["float"] - row["test"]) for row in done]
            within = sum(fall <= 100 * MAX_DROP + 1e-6 for fall in falls)
            cells = [name, arm, f"{within} of {len(found)}" + (f", {len(found) - len(done)} refused" * (done != found))]
            if done:
                shares, evaluations = [row["int8"] for row in done], [row.get("evaluations", 0) for row in done]
                cells += [f"{statistics.median(falls):+.1f}, {max(falls):+.1f}"]
                cells += [f"{statistics.median(shares):.0%}, {min(shares):.0%}"]
                cells += [
                    f"{statistics.median(evaluations):.0f}",
                    f"{statistics.median(row['seconds'] for row in done):.1f}",
                ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--file", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.file.read_text().splitlines()] if options.file.exists() else []
    if options.table:
        print(table(rows))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    arms = list(ARMS)
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        print(f"NNCF is left out: {error}", file=sys.stderr)
        arms.remove(NNCF)
    done = {(row["network"], row["seed"], row["arm"]) for row in rows}
    for name in NETWORKS:
        for seed in range(options.seeds):
            for arm in arms:
                if (name, seed, arm) not in done:
                    row = {"network": name, "seed": seed, "arm": arm, **measure(name, seed, arm)}
                    with options.file.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row, file=sys.stderr)


if __name__ == "__main__":
    main()
