"""Writes, runs and reads the files of `runtimes.py`: float ones, those of the runtimes' own toolkits, and ours.

Whatever wrote a file, it runs the same way: onnxruntime with a dynamic batch and all of its optimizations, OpenVINO
compiled for the input's shape. OpenVINO runs float parts in bfloat16 where the CPU has it, so it is asked for float32;
what it does of its own accord is a runtime of its own here.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress import export, quantize
from lightning_compress.quantization.numerics.int8 import has_vnni
from lightning_compress.quantization.schemes import Scheme

Call = Callable[[], Tensor]
ONNXRUNTIME, OPENVINO, OPENVINO_OWN = "onnxruntime", "OpenVINO", "OpenVINO, its own precision"
MULTIPLY = ("Conv", "Gemm", "MatMul", "LSTM", "RNN", "FullyConnected")
CONVERT = ("Convert", "QuantizeLinear", "DequantizeLinear")
Nodes = Iterator[tuple[str, bool]]  # of a runtime's graph: the kind, and whether it computes in int8


# Writing. A writer takes the float network's ONNX file, calibration batches and the folder to write into.


def write_float(network: nn.Module, x: Tensor, path: Path) -> Path:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(
        network, (x,), path, input_names=["x"], dynamic_shapes=dynamic, external_data=False, verbose=False
    )
    return path


def write_ours(network: nn.Module, scheme: Scheme, target: str, batches: list[Tensor], path: Path) -> Path:
    quantized = quantize(network, scheme, calibration=batches)
    return Path(export(quantized, (batches[0],), path, target=target).path)


def _save_openvino(model: Any, path: Path) -> Path:
    importlib.import_module("openvino").save_model(model, path, compress_to_fp16=False)
    return path


def nncf_static(source: Path, batches: list[Tensor], folder: Path, preset: str, is_transformer: bool) -> Path:
    nncf, openvino = importlib.import_module("nncf"), importlib.import_module("openvino")
    kind = nncf.ModelType.TRANSFORMER if is_transformer else None
    data = nncf.Dataset([batch.numpy() for batch in batches])
    model = nncf.quantize(
        openvino.Core().read_model(source), data, preset=nncf.QuantizationPreset(preset), model_type=kind
    )
    return _save_openvino(model, folder / f"nncf_{preset}.xml")


def nncf_weights(source: Path, batches: list[Tensor], folder: Path, mode: str, **options: Any) -> Path:
    nncf, openvino = importlib.import_module("nncf"), importlib.import_module("openvino")
    model = nncf.compress_weights(openvino.Core().read_model(source), mode=nncf.CompressWeightsMode(mode), **options)
    return _save_openvino(model, folder / f"nncf_{mode}.xml")


def _prepared(source: Path, folder: Path) -> Path:
    """What onnxruntime's own toolkit asks for before it quantizes: folded BatchNorm. Shapes are in the file already."""
    path = folder / f"{source.stem}_prepared.onnx"
    module = importlib.import_module("onnxruntime.quantization.shape_inference")
    module.quant_pre_process(str(source), str(path), skip_symbolic_shape=True)
    return path


def onnxruntime_static(source: Path, batches: list[Tensor], folder: Path, is_transformer: bool) -> Path:
    """Of a transformer only products with weights: whole, it is neither right nor fast."""
    kit, left = importlib.import_module("onnxruntime.quantization"), iter(batches)

    class Reader(kit.CalibrationDataReader):  # type: ignore[name-defined,misc]
        def get_next(self) -> Any:
            return None if (batch := next(left, None)) is None else {"x": batch.numpy()}

    path = folder / "onnxruntime_static.onnx"
    kit.quantize_static(
        _prepared(source, folder),
        path,
        Reader(),
        quant_format=kit.QuantFormat.QDQ,
        per_channel=True,
        activation_type=kit.QuantType.QUInt8,
        weight_type=kit.QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"] if is_transformer else None,
        extra_options={"MatMulConstBOnly": is_transformer},
    )
    return path


def onnxruntime_dynamic(source: Path, batches: list[Tensor], folder: Path) -> Path:
    kit, path = importlib.import_module("onnxruntime.quantization"), folder / "onnxruntime_dynamic.onnx"
    kit.quantize_dynamic(_prepared(source, folder), path, per_channel=True, weight_type=kit.QuantType.QInt8)
    return path


def onnxruntime_4_bits(source: Path, batches: list[Tensor], folder: Path, accuracy_level: int) -> Path:
    module = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    path = folder / f"onnxruntime_4_bits_{accuracy_level}.onnx"
    model = importlib.import_module("onnx").load(source)
    quantizer = module.MatMulNBitsQuantizer(model, bits=4, block_size=32, accuracy_level=accuracy_level)
    quantizer.process()
    quantizer.model.save_model_to_file(str(path))
    return path


def file_bytes(path: Path) -> int:
    """An OpenVINO model's weights lie beside its graph."""
    return sum(part.stat().st_size for part in {path, path.with_suffix(".bin")} if part.exists())


# Running.


def _session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    runtime = importlib.import_module("onnxruntime")
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = threads, 3
    if not has_vnni():
        settings.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        settings.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        settings.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def _compiled(path: Path, shape: torch.Size, threads: int, options: dict[str, Any]) -> Any:
    core = importlib.import_module("openvino").Core()
    model = core.read_model(path)
    model.reshape(list(shape))
    options = options | {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    return core.compile_model(model, "CPU", options)


HINTS: dict[str, dict[str, Any]] = {OPENVINO: {"INFERENCE_PRECISION_HINT": "f32"}, OPENVINO_OWN: {}}


def bind(runtime: str, path: Path, x: Tensor, threads: int) -> Call:
    """A call of the file for one input, which is converted beforehand."""
    array = x.numpy()
    if runtime == ONNXRUNTIME:
        session = _session(path, threads)
        feed = {session.get_inputs()[0].name: array}
        return lambda: torch.from_numpy(session.run(None, feed)[0])
    request = _compiled(path, x.shape, threads, HINTS[runtime]).create_infer_request()
    return lambda: torch.from_numpy(next(iter(request.infer([array], share_inputs=True).values())))


# What a runtime computes in int8, in its own graph.


def onnxruntime_nodes(path: Path, folder: Path) -> Nodes:
    onnx = importlib.import_module("onnx")
    _session(path, 1, folder / "optimized.onnx")
    graph, kinds = onnx.load(folder / "optimized.onnx").graph, (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)
    codes = {value.name for value in graph.value_info if value.type.tensor_type.elem_type in kinds}
    codes |= {tensor.name for tensor in graph.initializer if tensor.data_type in kinds}
    for node in graph.node:
        is_int8 = node.op_type not in CONVERT and bool(codes & {*node.input})
        if node.op_type == "MatMulNBits":  # its weights are codes, whatever it multiplies in
            is_int8 = any(part.name == "accuracy_level" and part.i == 4 for part in node.attribute)
        yield node.op_type, is_int8


def openvino_nodes(path: Path, runtime: str, x: Tensor) -> Nodes:
    """By the kernel's name: the precision of a layer of compressed weights is theirs, whatever it multiplies in."""
    for node in _compiled(path, x.shape, 1, HINTS[runtime]).get_runtime_model().get_ops():
        keys = ("layerType", "primitiveType", "runtimePrecision")
        kind, kernel, precision = (node.rt_info[key].astype(str) for key in keys)
        yield kind, kernel.lower().endswith("_i8") if _multiplies(kind) else precision in ("u8", "i8")


def _multiplies(kind: str) -> bool:
    return kind not in CONVERT and any(part in kind for part in MULTIPLY)


def counted(nodes: Iterable[tuple[str, bool]]) -> tuple[str, str]:
    """Counts of kinds in int8, and of the others."""
    counts = sorted(Counter(nodes).items())
    texts = (", ".join(f"{n} {kind}" for (kind, is_int8), n in counts if is_int8 is wanted) for wanted in (True, False))
    int8, others = texts
    return int8, others


def int8_nodes(runtime: str, path: Path, x: Tensor, folder: Path) -> str:
    """Counts of the nodes that multiply, those in int8 first."""
    nodes = onnxruntime_nodes(path, folder) if runtime == ONNXRUNTIME else openvino_nodes(path, runtime, x)
    int8, others = counted(node for node in nodes if _multiplies(node[0]))
    return f"int8: {int8 or 'none'}; float: {others or 'none'}"
