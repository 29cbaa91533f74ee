"""Times int8: latency beside OpenVINO and ONNX Runtime, and calibration. `qat_cost.py` has training.

Networks have the shapes of well-known ones and random weights; their BatchNorm has seen data. What is compared takes
turns in one process, and each ratio is taken within a round. Other processes distort more than noise: two OpenMP
threads that wait for each other on one core take twenty times as long, so a disturbed turn is repeated. `--threads 1`
counts CPU time, which they hardly change. The peers are optional.

Run it with `python benchmarks/int8_speed.py` (half an hour on two idle cores; `--only latency --networks conv1d` for a
quick look, `--profile` to see which operations take the time).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import io
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from pruning_speed import quartiles
from shapes.well_known import NETWORKS, Bert
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F

from lightning_compress import quantize
from lightning_compress.quantization.numerics.int8 import ENGINES, OBSERVERS, StaticInt8, needs_reduced_range

FLOAT, OPENVINO = "float32, eager", "OpenVINO, int8 by NNCF"
now = time.perf_counter
disturbed = {"turns": 0, "seconds": 0.0}


def build(name: str, arguments: argparse.Namespace) -> tuple[nn.Module, Callable[[int], Tensor]]:
    """The network, and its inputs by batch size."""
    torch.manual_seed(0)
    if name == "bert":
        return Bert(arguments.layers).eval(), lambda batch: torch.randint(30522, (batch, 128))
    shape = (1, 16000) if name == "conv1d" else (3, arguments.image_size, arguments.image_size)
    network = NETWORKS[name]()
    with torch.no_grad():
        for _ in range(10):  # BatchNorm's statistics; with the initial ones activations would fade or grow
            network.train()(torch.randn(8, *shape))
    return network.eval(), lambda batch: torch.randn(batch, *shape)


# Time.


def clock(call: Callable[[], Any]) -> float:
    started = now()
    call()
    return now() - started


def _others() -> float:
    """Seconds of CPU that other processes have had (Linux only)."""
    if not Path("/proc/stat").exists():
        return 0.0
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    own = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def undisturbed(measure: Callable[[], float], patience: float) -> float:
    """``measure()``, again while others take a tenth of a core, as long as ``patience`` seconds last for the run."""
    while True:
        before, started = _others(), time.perf_counter()
        value = measure()
        seconds = time.perf_counter() - started
        if now is time.process_time or _others() - before < 0.1 * seconds + 0.02:
            return value
        if disturbed["seconds"] > patience:
            disturbed["turns"] += 1
            return value
        time.sleep(1)
        disturbed["seconds"] += seconds + 1


def typical_ms(call: Callable[[], Any], seconds: float = 0.6) -> float:
    """Milliseconds of a call, the median of those that fit in ``seconds``."""
    count = min(max(int(seconds / clock(call)), 3), 30)
    return 1e3 * statistics.median(clock(call) for _ in range(count))


def in_turns(calls: dict[str, Callable[[], float]], rounds: int, patience: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    disturbed["turns"] = 0
    for _ in range(rounds):
        for name, measure in calls.items():
            times[name].append(undisturbed(measure, patience))
    if disturbed["turns"]:
        print(f"\nOf {rounds * len(calls)} turns, other processes disturbed {disturbed['turns']}.")
    return times


def ratios(values: list[float], bases: list[float], unit: str = "") -> str:
    low, middle, high = quartiles([value / base for value, base in zip(values, bases, strict=True)])
    return f"{middle:.2f}{unit} | {low:.2f} to {high:.2f}"


# Latency. An arm is one form of a network.


@dataclass
class Arm:
    size_bytes: int
    seconds: float  # what making it took, calibration included
    bind: Callable[[Tensor], Callable[[], Tensor]]  # the call for one input; peers compile for its shape


def torch_arm(make: Callable[[], nn.Module]) -> Arm:
    started = time.perf_counter()
    model = make()
    seconds, file = time.perf_counter() - started, io.BytesIO()
    torch.save(model.state_dict(), file)
    # A copy, as dynamo compiles the second shape that one graph sees for all shapes.
    return Arm(file.getbuffer().nbytes, seconds, lambda x: partial(copy.deepcopy(model), x))


def openvino_arms(network: nn.Module, batches: list[Tensor], is_transformer: bool, threads: int) -> dict[str, Arm]:
    import nncf
    import openvino

    core, kind = openvino.Core(), nncf.ModelType.TRANSFORMER if is_transformer else None
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}

    def arm(make: Callable[[], Any]) -> Arm:
        started = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            openvino.save_model(model, Path(folder, "model.xml"), compress_to_fp16=False)
            size = Path(folder, "model.bin").stat().st_size

        def bind(x: Tensor) -> Callable[[], Tensor]:
            shaped, array = model.clone(), x.numpy()
            shaped.reshape(list(x.shape))
            request = core.compile_model(shaped, "CPU", options).create_infer_request()
            return lambda: torch.from_numpy(next(iter(request.infer([array], share_inputs=True).values())))

        return Arm(size, seconds, bind)

    model = openvino.convert_model(network, example_input=batches[0])
    data = nncf.Dataset([batch.numpy() for batch in batches])
    return {
        "OpenVINO, float32": arm(lambda: model),
        OPENVINO: arm(lambda: nncf.quantize(model, data, model_type=kind)),
    }


def onnxruntime_arms(network: nn.Module, batches: list[Tensor], threads: int, folder: str) -> dict[str, Arm]:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        left = iter(batches)

        def get_next(self) -> Any:
            return None if (batch := next(self.left, None)) is None else {"x": batch.numpy()}

    whole, prepared, int8 = (str(Path(folder, name)) for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(network, (batches[0],), whole, input_names=["x"], dynamic_shapes=dynamic, external_data=False)
    started = time.perf_counter()
    quant_pre_process(whole, prepared)
    options: dict[str, Any] = {"per_channel": True, "reduce_range": needs_reduced_range()}
    quantize_static(prepared, int8, Reader(), quant_format=QuantFormat.QDQ, **options)
    seconds, settings = time.perf_counter() - started, onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(int8, settings, providers=["CPUExecutionProvider"])

    def bind(x: Tensor) -> Callable[[], Tensor]:
        return lambda: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return {"ONNX Runtime, int8 QDQ": Arm(Path(int8).stat().st_size, seconds, bind)}


def make_arms(name: str, network: nn.Module, batches: list[Tensor], threads: int, folder: str) -> dict[str, Arm]:
    made = {FLOAT: torch_arm(lambda: network)}
    for engine in ENGINES:
        scheme = StaticInt8(engine=engine)
        made[f"ours, int8_static, {engine}"] = torch_arm(partial(quantize, network, scheme, batches))
    if name == "bert":
        made["ours, int8_dynamic"] = torch_arm(lambda: quantize(network, "int8_dynamic"))
        made["torch's quantize_dynamic"] = torch_arm(lambda: quantize_dynamic(network))
    peers: dict[tuple[str, ...], Callable[[], dict[str, Arm]]] = {
        ("openvino", "nncf"): lambda: openvino_arms(network, batches, name == "bert", threads),
        ("onnx", "onnxscript", "onnxruntime"): lambda: onnxruntime_arms(network, batches, threads, folder),
    }
    for packages, make in peers.items():
        if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
            print(f"Without {packages[-1]}: {', '.join(missing)} isn't installed.")
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            made |= make()
    return made


def latency(name: str, arguments: argparse.Namespace, folder: str) -> None:
    network, inputs = build(name, arguments)
    arms = make_arms(name, network, [inputs(4) for _ in range(4)], arguments.threads, folder)
    for batch in (1, 4) if name == "bert" else (1, 8):
        torch._dynamo.reset()
        x, outputs, first = inputs(batch), {}, {}
        with torch.inference_mode():
            calls = {arm: made.bind(x) for arm, made in arms.items()}
            for arm, call in calls.items():
                started = time.perf_counter()
                outputs[arm] = call().clone()
                first[arm] = time.perf_counter() - started
            turns = {arm: partial(typical_ms, call) for arm, call in calls.items()}
            times = in_turns(turns, arguments.rounds, arguments.patience)
        print(
            f"\n| {name}, batch {batch} | Median (ms) | Faster than float32 | Middle half | Time to OpenVINO's int8 "
            "| Middle half | Weights (MB) | Cosine to float32 | Made in (s) | First call (s) |\n"
            "|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
        )
        for arm, values in times.items():
            likeness = F.cosine_similarity(outputs[arm].flatten(), outputs[FLOAT].flatten(), dim=0)
            print(
                f"| {arm} | {statistics.median(values):.1f} | {ratios(times[FLOAT], values, 'x')} "
                f"| {ratios(values, times[OPENVINO]) if OPENVINO in times else '- | -'} "
                f"| {arms[arm].size_bytes / 1e6:.1f} | {likeness:.4f} | {arms[arm].seconds:.1f} | {first[arm]:.1f} |",
                flush=True,
            )
        for arm in (arm for arm in calls if arguments.profile and arm.startswith(("ours", "torch"))):
            print(f"{arm}: {where_time_goes(calls[arm])}", flush=True)


def where_time_goes(call: Callable[[], Any]) -> str:
    """Shares of a call's time by kind of operation, and the largest of the other ones."""
    with torch.inference_mode(), torch.profiler.profile() as profiler:
        for _ in range(5):
            call()
    shares = {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(shares.values()) or 1.0
    int8 = {key for key in shares if key.startswith(("quantized::", "onednn::q"))}
    rounding = {key for key in shares if "quantize" in key} - int8
    rest = sorted(shares.keys() - int8 - rounding, key=lambda key: -shares[key])[:6]
    named = ", ".join(f"{key} {shares[key] / total:.1%}" for key in rest)
    int8_share, rounding_share = (sum(shares[key] for key in keys) / total for keys in (int8, rounding))
    return f"int8 kernels {int8_share:.1%}, to and from int8 {rounding_share:.1%}; {named}"


# Calibration.


def quantize_seconds(network: nn.Module, scheme: StaticInt8, batches: list[Tensor]) -> tuple[float, float]:
    """Seconds that `quantize` spends in its calibration, and in all."""
    module, spent = importlib.import_module("lightning_compress.quantization.quantize"), []
    calibrate = module.calibrate

    def timed(*args: Any, **kwargs: Any) -> None:
        spent.append(clock(lambda: calibrate(*args, **kwargs)))

    with patch.object(module, "calibrate", timed):
        whole = clock(lambda: quantize(network, scheme, batches))
    return sum(spent), whole


def calibration(arguments: argparse.Namespace) -> None:
    network, inputs = build("resnet18", arguments)
    batches = [inputs(8) for _ in range(8)]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                network(batch)

    arms = {observer: StaticInt8(observer=observer) for observer in OBSERVERS}
    wholes: dict[str, float] = {}

    def observed(arm: str) -> float:
        seconds, wholes[arm] = quantize_seconds(network, arms[arm], batches)
        return seconds

    turns = {"plain": partial(clock, plain), **{arm: partial(observed, arm) for arm in arms}}
    times = in_turns(turns, arguments.rounds, arguments.patience)
    print(
        "\n| Calibration of resnet18, 8 batches of 8 | Median (s) | To plain forwards | Middle half | All of quantize, "
        "last round (s) |\n|:--|--:|--:|--:|--:|"
    )
    for arm, values in times.items():
        whole = f"{wholes[arm]:.1f}" if arm in wholes else ""
        print(f"| {arm} | {statistics.median(values):.2f} | {ratios(values, times['plain'])} | {whole} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="What int8 gains and costs.")
    parser.add_argument("--only", nargs="+", choices=("latency", "calibration"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12, help="of BERT")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patience", type=float, default=600, help="seconds, in all, for turns that others disturb")
    parser.add_argument("--profile", action="store_true", help="say which operations take the time")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "nncf", "torch.onnx", "root"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    global now
    now = time.process_time if arguments.threads == 1 else time.perf_counter

    features = {name: getattr(torch.cpu, f"_is_{name}_supported")() for name in ("avx2", "avx512", "vnni", "amx_tile")}
    print(
        f"{arguments.rounds} rounds, {arguments.threads} thread(s), {now.__name__}, torch {torch.__version__}\n"
        f"{features}\n"
        "Targets on a CPU with VNNI: ResNet-18 2.5x float32, compiled 5x and at most 1.15 of OpenVINO's int8; "
        "dynamic BERT 2x. "
        + ("" if features["vnni"] else "This CPU has none: it can't tell whether they are met.")
        + "\nTarget of calibration: at most 1.5 of float32."
    )
    parts = arguments.only or ("latency", "calibration")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # an empty one: the first call is to show what compiling takes
        for name in arguments.networks if "latency" in parts else ():
            latency(name, arguments, folder)
    if "calibration" in parts:
        calibration(arguments)


if __name__ == "__main__":
    main()
