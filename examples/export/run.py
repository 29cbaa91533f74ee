"""Run a file of `train.py` with numpy and its runtime alone; ExecuTorch's Python module takes torch's tensors.

Run it with `python examples/export/run.py demo_output/export/digits.onnx`. It needs nothing of lightning_compress.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np


def has_vnni() -> bool:
    """Tell whether Linux names VNNI among what the CPU has; other systems aren't asked."""
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_vnni" in flags.read_text()


def in_onnxruntime(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if not has_vnni():  # whose sums of 8-bit products don't overflow
        settings.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    [images] = session.get_inputs()
    return lambda batch: session.run(None, {images.name: batch})[0]


def in_openvino(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU")
    return lambda batch: compiled(batch)[0]


def in_executorch(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import executorch.kernels.quantized  # noqa: F401, registers the kernels of roundings
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(path)  # which must live as long as its method
    method = program.load_method("forward")
    largest = method.metadata.input_tensor_meta(0).sizes()
    method.execute([torch.zeros(largest)])  # the largest call first: see docs/executorch.md
    return lambda batch: method.execute([torch.from_numpy(batch)])[0].numpy().copy()  # a view of its memory


path = Path(sys.argv[1])
facts = json.loads(Path(f"{path}.json").read_text())  # what `export` says of the file
run = {"onnxruntime": in_onnxruntime, "openvino": in_openvino, "executorch": in_executorch}[facts["runtime"]](path)
digits = np.load(path.parent / "digits.npz")
most = facts["max_batch"] or len(digits["images"])
batches = [digits["images"][start : start + most] for start in range(0, len(digits["images"]), most)]
classes = np.concatenate([run(batch).argmax(axis=1) for batch in batches])
same = int((classes == digits["classes"]).sum())
print(f"{path.name} in {facts['runtime']}: the same class as the model for {same} of {len(classes)} test digits.")
sys.exit(same < len(classes))
