"""Measures the accuracy of int8 networks over five folds: ranges, adjustments, training, and other tools.

In a fold every row starts from the same float weights and training images and gives true int8 outputs of the same test
images, so differences are paired by fold. Two of the five networks are easy ones with channels re-scaled to be hard for
int8; they compute the same in float. Other tools are optional: `pip install onnxruntime onnxscript nncf openvino`.

Run it with `python benchmarks/int8_accuracy.py > tables.md` (half an hour; a quick look: `--folds 1 --networks cnn`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import itertools
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "digits"))  # the examples are no package

import digits_fits
import pruning_quality
from data import FOLDS, Digits
from networks import Student, conv_bn
from pruning_quality import Transformer

from lightning_compress import QuantizationAwareTraining, StaticInt8, Targets, quantize
from lightning_compress.quantization.numerics.int8 import needs_reduced_range

WHOLE, TUNING = (40, 3e-3), (5, 3e-4)  # epochs and learning rate


class Inverted(nn.Module):
    """A block of MobileNetV2: 1x1 to more channels, depthwise, 1x1 to fewer without an activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        wide, self.skips = 4 * inputs, inputs == outputs and stride == 1
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), activation()),
            *(nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), activation()),
            *(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skips else self.body(x)


class Depthwise(nn.Module):
    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        shapes = ((12, 12, 1), (12, 16, 2), (16, 16, 1), (16, 24, 2), (24, 24, 1))
        self.stem = nn.Sequential(*conv_bn(1, 12), activation())
        self.blocks = nn.Sequential(*(Inverted(*shape, activation) for shape in shapes))
        self.last = nn.Sequential(nn.Conv2d(24, 64, 1, bias=False), nn.BatchNorm2d(64), activation())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


@torch.no_grad()
def rescale_(network: nn.Module, fold: int) -> None:
    """Divide channels by factors from 0.1 to 10, and multiply the weights that read them; ReLU lets factors through."""
    draws = torch.Generator().manual_seed(fold)
    for norm, reader in ((block.body[at], block.body[at + 2]) for block in network.blocks for at in (1, 4)):
        factors = 10 ** (2 * torch.rand(len(norm.weight), generator=draws) - 1)
        norm.weight /= factors
        norm.bias /= factors
        reader.weight *= factors.view((-1, 1, 1, 1) if reader.groups > 1 else (1, -1, 1, 1))


@torch.no_grad()
def outliers_(network: nn.Module, fold: int) -> None:
    """Multiply three channels of each LayerNorm by 20, and divide the weights that read them."""
    channels = torch.randperm(48, generator=torch.Generator().manual_seed(fold))[:3]
    for block in network.blocks:
        for norm, reader in ((block.before_attention, block.query_key_value), (block.before_perceptron, block.up)):
            norm.weight[channels] *= 20
            norm.bias[channels] *= 20
            reader.weight[:, channels] /= 20


class Kind(NamedTuple):
    title: str
    build: Callable[[], nn.Module]
    harden_: Callable[[nn.Module, int], None] | None = None


NETWORKS = {
    "cnn": Kind("CNN", Student),
    "relu6": Kind("Depthwise CNN, ReLU6", partial(Depthwise, nn.ReLU6)),
    "rescaled": Kind("Depthwise CNN, re-scaled channels", partial(Depthwise, nn.ReLU), rescale_),
    "transformer": Kind("Transformer", Transformer),
    "outliers": Kind("Transformer, outlier channels", Transformer, outliers_),
}

FLOAT, PTQ = "float32", "**`int8_static`, its defaults**"
QAT, TUNED, TUNED_FLOAT = "**QAT, a whole fit**", "**QAT, 5 more epochs**", "float32, 5 more epochs"
FIXED = "7-bit weights"  # other tools' names for it are `reduce_range` and `overflow_fix`
Row = tuple[str, Tensor]  # with the outputs of the test images


def initial(kind: Kind, fold: int) -> nn.Module:
    L.seed_everything(fold, verbose=False)
    return kind.build()


def fit(network: nn.Module, fold: int, epochs: int, lr: float, *callbacks: L.Callback) -> nn.Module:
    """The module in evaluation after a fit: its int8 form, where a callback left one."""
    model = pruning_quality.Fast(network.train(), lr)  # Lightning leaves a network in the mode that it is in
    digits_fits.fit(model, Digits(fold), epochs, callbacks=callbacks)
    return model.eval()


def without_training(kind: Kind, network: nn.Module, batches: list[Tensor], images: Tensor) -> Iterator[Row]:
    observers = ({"observer": name} for name in ("moving_average", "histogram"))
    schemes = [{}, *observers, {"reduce_range": True}, {"equalize": False}]
    if kind.build is Transformer:  # the others have no LayerNorm to smooth
        schemes += [{"smooth": False}, {"equalize": False, "smooth": False}]
    for scheme in schemes:
        row = ", ".join(f"`{name}={value!r}`" for name, value in scheme.items())
        yield row or PTQ, quantize(network, StaticInt8(**scheme), calibration=batches)(images)
    if kind.build is Transformer:
        yield "a float32 head", quantize(network, calibration=batches, targets=Targets(exclude=["head"]))(images)
        yield "`int8_dynamic`", quantize(network, "int8_dynamic")(images)
    yield "`int8_weight_only`", quantize(network, "int8_weight_only")(images)


def with_training(kind: Kind, network: nn.Module, fold: int, images: Tensor) -> Iterator[Row]:
    if kind.harden_ is None:  # the hard form of a network exists only once it is trained
        yield QAT, fit(initial(kind, fold), fold, *WHOLE, QuantizationAwareTraining())(images)
    yield TUNED, fit(copy.deepcopy(network), fold, *TUNING, QuantizationAwareTraining())(images)
    yield TUNED_FLOAT, fit(copy.deepcopy(network), fold, *TUNING)(images)


def by_onnxruntime(kind: Kind, network: nn.Module, batches: list[Tensor], images: Tensor) -> Iterator[Row]:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        get_next = staticmethod(partial(next, iter([{"x": batch.numpy()} for batch in batches]), None))

    options: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
    options |= {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": needs_reduced_range()}
    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, int8 = (str(Path(folder, name)) for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(network, (batches[0],), whole, input_names=["x"], dynamic_shapes=dynamic, external_data=False)
        quant_pre_process(whole, prepared)
        quantize_static(prepared, int8, Reader(), **options)
        session = onnxruntime.InferenceSession(int8, providers=["CPUExecutionProvider"])
        yield f"ONNX Runtime, QDQ, {FIXED}", torch.from_numpy(session.run(None, {"x": images.numpy()})[0])


def by_nncf(kind: Kind, network: nn.Module, batches: list[Tensor], images: Tensor) -> Iterator[Row]:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    advanced = partial(nncf.AdvancedQuantizationParameters, nncf.OverflowFix.ENABLE)
    rows: dict[str, dict[str, Any]] = {"its defaults": {}, FIXED: {"advanced_parameters": advanced()}}
    if kind.build is Transformer:  # its SmoothQuant ruins the head, which reads two dimensions: one of the two goes
        unsmoothed = advanced(smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1))
        head = nncf.IgnoredScope(patterns=[".*head.*"])
        known = {"model_type": nncf.ModelType.TRANSFORMER, "advanced_parameters": advanced()}
        rows[f"transformer, not smoothed, {FIXED}"] = {**known, "advanced_parameters": unsmoothed}
        rows[f"transformer, a float32 head, {FIXED}"] = {**known, "ignored_scope": head}
    data = nncf.Dataset([batch.numpy() for batch in batches])
    for row, settings in rows.items():
        model = openvino.convert_model(network, example_input=batches[0])
        model = nncf.quantize(model, data, subset_size=len(batches), **settings)
        compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        yield f"NNCF, {row}", torch.from_numpy(compiled(images.numpy())[0])


class Scores(NamedTuple):
    accuracy: float  # percent
    other: float  # percent of answers that aren't those of float32
    divergence: float  # nats


def score(outputs: Tensor, truth: Tensor, labels: Tensor) -> Scores:
    logs, answers = [logits.detach().double().log_softmax(1) for logits in (outputs, truth)], outputs.argmax(1)
    shares = [100 * answer.double().mean().item() for answer in (answers == labels, answers != truth.argmax(1))]
    return Scores(*shares, functional.kl_div(*logs, log_target=True, reduction="batchmean").item())


def run_fold(kind: Kind, fold: int) -> Iterator[tuple[str, Scores]]:
    data = Digits(fold)
    data.setup("test")
    batches = [images for images, _ in data.calibration_dataloader()]
    images, labels = next(iter(data.test_dataloader()))
    network = fit(initial(kind, fold), fold, *WHOLE).network
    if kind.harden_ is not None:
        kind.harden_(network, fold)
    truth = network(images)
    rows = [iter([(FLOAT, truth)]), without_training(kind, network, batches, images)]
    for peer, packages in ((by_onnxruntime, ("onnx", "onnxscript", "onnxruntime")), (by_nncf, ("openvino", "nncf"))):
        if all(importlib.util.find_spec(package) for package in packages):
            rows.append(peer(kind, network, batches, images))
        else:
            print(f"Not all of {', '.join(packages)} are installed: their rows are left out.")
    rows.append(with_training(kind, network, fold, images))
    yield from ((row, score(outputs, truth, labels)) for row, outputs in itertools.chain(*rows))


def estimate(values: list[float]) -> list[float]:
    """Mean, and the ends of its 95 % t-interval."""
    mean, half = statistics.fmean(values), math.inf
    if len(values) > 1:
        half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [mean, mean - half, mean + half]


def text(value: list[float], form: str = "+.2f", neutral: float = 0.0) -> str:
    """Bold where the interval excludes ``neutral``."""
    mean, low, high = (f"{round(number, 2) + 0.0:{form}}" for number in value)  # no -0.00
    bold = "**" if value[1] > neutral + 1e-9 or value[2] < neutral - 1e-9 else ""
    return f"{bold}{mean} [{low}, {high}]{bold}"


def table(kind: Kind, results: dict[str, list[Scores]]) -> str:
    accuracies = {row: [score.accuracy for score in scores] for row, scores in results.items()}

    def points(row: str, base: str) -> str:
        return text(estimate([first - second for first, second in zip(accuracies[row], accuracies[base], strict=True)]))

    by_fold = " ".join(f"{accuracy:.1f}" for accuracy in accuracies[FLOAT])
    lines = [
        f"## {kind.title}: float32 {statistics.fmean(accuracies[FLOAT]):.2f} % (by fold {by_fold})\n",
        "| Row | To float32 (points) | To the defaults (points) | KL (1e-3 nats) | Times the defaults' | Others (%) |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for row in list(results)[1:]:
        logs = [[math.log(1e3 * score.divergence) for score in results[name]] for name in (row, PTQ)]
        factor = [math.exp(value) for value in estimate([first - second for first, second in zip(*logs, strict=True)])]
        ratio = "" if row in (PTQ, QAT, TUNED, TUNED_FLOAT) else text(factor, ".2f", 1.0)
        to_defaults, other = (
            "" if row == PTQ else points(row, PTQ),
            statistics.fmean(score.other for score in results[row]),
        )
        cells = [points(row, FLOAT), to_defaults, f"{math.exp(statistics.fmean(logs[0])):.3g}", ratio, f"{other:.2f}"]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"\n{TUNED} to {TUNED_FLOAT}: {points(TUNED, TUNED_FLOAT)} points."])


def main() -> None:
    parser = argparse.ArgumentParser(description="Five-fold cross-validation of int8.")
    parser.add_argument("--folds", type=int, default=FOLDS, help="the first so many of five")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    digits_fits.quiet()
    torch.set_num_threads(1)
    all_results: dict[str, dict[str, list[Scores]]] = {name: {} for name in arguments.networks}
    started = time.perf_counter()
    for fold, name in itertools.product(range(arguments.folds), all_results):
        with contextlib.redirect_stdout(sys.stderr):  # exporters talk
            for row, scores in run_fold(NETWORKS[name], fold):
                all_results[name].setdefault(row, []).append(scores)
                numbers = f"{scores.accuracy:.5f} %, {scores.other:.5f} % others, KL {1e3 * scores.divergence:.6g}e-3"
                print(f"{time.perf_counter() - started:5.0f} s  {name} fold {fold} {row}: {numbers}", flush=True)
    for name, results in all_results.items():
        print(f"{table(NETWORKS[name], results)}\n")


if __name__ == "__main__":
    main()
