"""The runtimes that files are for: how each opens a file, runs it, and tells what it computes in int8."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_compress.errors import CompressionError, MissingExtraError, in_a_line
from lightning_compress.quantization.numerics.int8 import has_vnni

Session = Callable[[Sequence[Tensor]], list[Tensor]]
"""An opened file: takes the tensors of a call in order, and gives those of the output."""


class Runtime:
    """Runs files.

    Attributes:
        name: of the runtime.
        packages: what it needs, each with the extra of this package that installs it.
        levels: of optimization at which a file is proven.
        coarse: the level that users get where it is none of these, as it computes less exactly; else it is the last.
        settings: with which it computes what a file says; sessions of users are to have them too.
    """

    name: str
    packages: Mapping[str, str] = {}
    levels: tuple[str, ...] = ("",)
    coarse: str = ""
    settings: Mapping[str, str] = {}

    def require(self) -> None:
        """Raise `MissingExtraError` where a package isn't installed."""
        for package, extra in self.packages.items():
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(f"A file for {self.name}", package, extra)

    def versions(self) -> dict[str, str]:
        """Return the versions of what it needs."""
        return {package: importlib.metadata.version(package) for package in self.packages}

    def open(self, path: Path, level: str = "", threads: int | None = None) -> Session:
        """Open a file.

        Raises:
            CompressionError: the runtime rejects it.
        """
        self.require()
        with self._taking(path):
            session = self._open(path, level or self.coarse or self.levels[-1], threads)

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            try:
                return session(tensors)
            except Exception as error:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
                raise CompressionError(
                    f"{path.name} must run in {self.name} on inputs of {shapes}. Received: {in_a_line(error)}. Where "
                    "other sizes run, export for them alone: dynamic_batch=False."
                ) from error

        return run

    @contextmanager
    def _taking(self, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise CompressionError(
                f"`path` must be a file that {self.name} runs. Received: {path.name}, {in_a_line(error)}."
            ) from error

    @abstractmethod
    def _open(self, path: Path, level: str, threads: int | None) -> Session: ...

    def float_layers(self, path: Path, layers: Collection[str]) -> dict[str, str]:
        """Return which of these layers the runtime computes in float, each with the reason.

        Args:
            path: of a file.
            layers: names of the codes of weights in the file.

        Raises:
            CompressionError: the runtime rejects the file.
        """
        with self._taking(path):
            return self._float_layers(path, layers)

    def _float_layers(self, path: Path, layers: Collection[str]) -> dict[str, str]:
        return {}


class OnnxRuntime(Runtime):
    """onnxruntime, on the CPU."""

    name = "onnxruntime"
    packages = {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"}  # noqa: RUF012
    levels = ("disabled", "basic", "extended", "all")
    settings = {  # noqa: RUF012
        "session.qdq_matmulnbits_accuracy_level": "1",  # floats stay floats
    }
    without_vnni = {"session.x64quantprecision": "1"}  # noqa: RUF012  where sums of 8-bit products overflow

    def _open(self, path: Path, level: str, threads: int | None, optimized: str = "") -> Session:
        runtime: Any = importlib.import_module("onnxruntime")
        settings = runtime.SessionOptions()
        settings.graph_optimization_level = {
            "disabled": runtime.GraphOptimizationLevel.ORT_DISABLE_ALL,
            "basic": runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
            "extended": runtime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
            "all": runtime.GraphOptimizationLevel.ORT_ENABLE_ALL,
        }[level]
        settings.log_severity_level = 3
        # With VNNI that one is right too, but takes twice the time.
        for key, value in (self.settings | ({} if has_vnni() else self.without_vnni)).items():
            settings.add_session_config_entry(key, value)
        settings.intra_op_num_threads = threads or torch.get_num_threads()
        if optimized:
            settings.optimized_model_filepath = optimized
        session = runtime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, arrays)]

        return run

    def _float_layers(self, path: Path, layers: Collection[str]) -> dict[str, str]:
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder, "optimized.onnx")
            self._open(path, "extended", None, str(optimized))
            nodes = list(_graph(optimized).node)
        kinds = {node.name: node.op_type for node in nodes}  # a kernel has the name of the operation that it replaces
        found = {}
        for codes, operation in readers_of_codes(_graph(path), layers):
            if not re.search(_INT8_KERNELS, kinds.get(operation.name, "")):
                found[codes] = _why_float(operation, nodes)
        return found


_INT8_KERNELS = r"^Q(Linear|Gemm)|Integer|^DynamicQuantize"


def _why_float(operation: Any, optimized: Sequence[Any]) -> str:
    """Say why onnxruntime has no int8 kernel in the place of an operation of a file."""
    if operation.op_type == "Conv":
        return "onnxruntime's int8 convolutions give codes, and its output stays float"
    behind = [node.op_type for node in optimized if set(operation.output) & set(node.input)]
    if any(node.op_type == "FusedGemm" and operation.name in node.name for node in optimized) or behind == ["Relu"]:
        return "onnxruntime computes it together with the activation behind it, in float"
    return f"onnxruntime has no int8 kernel for {operation.op_type} as it stands here"


class OpenVino(Runtime):
    """OpenVINO, on the CPU; ``f32`` rounds nothing that a file doesn't, ``default`` computes as the CPU is fastest."""

    name = "openvino"
    packages = {"onnx": "onnx", "onnxscript": "onnx", "openvino": "openvino"}  # noqa: RUF012
    levels = ("f32",)
    coarse = "default"

    def _compiled(self, path: Path, level: str, threads: int | None) -> Any:
        core = importlib.import_module("openvino").Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0} if level == "f32" else {}
        return core.compile_model(
            str(path), "CPU", {**settings, "INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        )

    def _open(self, path: Path, level: str, threads: int | None) -> Session:
        compiled = self._compiled(path, level, threads)
        outputs = list(compiled.outputs)

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            results = compiled([tensor.detach().cpu().numpy() for tensor in tensors])
            return [torch.from_numpy(results[output].copy()) for output in outputs]

        return run

    def _float_layers(self, path: Path, layers: Collection[str]) -> dict[str, str]:
        infos = [node.rt_info for node in self._compiled(path, "f32", None).get_runtime_model().get_ops()]
        precisions = {
            name.partition("/")[0]: info["runtimePrecision"].astype(str)
            for info in infos
            if info["layerType"].astype(str) in _PRODUCTS
            for name in info["originalLayersNames"].astype(str).split(",")
        }
        found = {}
        for codes, operation in readers_of_codes(_graph(path), layers):
            names = (operation.name, *operation.output)  # the last operation is named by its output
            precision = next((precisions[name] for name in names if name in precisions), "another operation")
            if precision not in ("u8", "i8"):
                found[codes] = f"OpenVINO computes it in {precision}"
        return found


_PRODUCTS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


class Torch(Runtime):
    """torch itself, which needs nothing of this package for such a file."""

    name = "torch"

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def _open(self, path: Path, level: str, threads: int | None) -> Session:
        module = torch.export.load(path).module()

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            with torch.no_grad(), _threads(threads):
                return [output.clone() for output in module(*tensors)]

        return run

    def _float_layers(self, path: Path, layers: Collection[str]) -> dict[str, str]:
        return dict.fromkeys(layers, "torch computes it in float, with the values of its codes")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class ExecuTorch(Runtime):
    """ExecuTorch, on the CPU, with as many threads as it thinks right. Its writer knows which layers are float.

    The largest call goes first: XNNPACK writes beyond its memory when a later call is larger (executorch 1.4.1).
    """

    name = "executorch"
    packages = {"executorch": "executorch"}  # noqa: RUF012

    def _open(self, path: Path, level: str, threads: int | None) -> Session:
        importlib.import_module("executorch.kernels.quantized")  # for the roundings that XNNPACK leaves
        program = importlib.import_module("executorch.runtime").Runtime.get().load_program(path)
        method = program.load_method("forward")
        planned = [method.metadata.input_tensor_meta(place).sizes() for place in range(method.metadata.num_inputs())]
        opened = [program]  # which the method reads

        def run(tensors: Sequence[Tensor]) -> list[Tensor]:
            if len(opened) == 1:
                sizes = zip(planned, tensors, strict=True)
                opened.append(method.execute([torch.zeros(size, dtype=tensor.dtype) for size, tensor in sizes]))
            given = [tensor.detach().cpu().contiguous() for tensor in tensors]
            return [output.clone() for output in method.execute(given)]  # views of the method's memory

        return run


def readers_of_codes(graph: Any, layers: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield the operations of an ONNX graph that take stored weights of these names, each with the name."""
    carried = {name: name for name in layers}
    for node in graph.node:
        codes = next((carried[name] for name in node.input if name in carried), None)
        if codes is not None and node.op_type in _PASSES:
            carried.update(dict.fromkeys(node.output, codes))
        elif codes is not None:
            yield codes, node


_PASSES = ("DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")


def _graph(path: Path) -> Any:
    onnx: Any = importlib.import_module("onnx")
    return onnx.load(str(path)).graph


RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in (OnnxRuntime(), OpenVino(), Torch(), ExecuTorch())}
