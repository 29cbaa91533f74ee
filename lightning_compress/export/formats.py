"""Which files there are: by target, the suffix and the runtime that proves them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lightning_compress.errors import invalid, nearest
from lightning_compress.export.runtimes import RUNTIMES


@dataclass(frozen=True)
class Format:
    """Describes the files of a target.

    Attributes:
        suffix: of a path.
        runtime: in which a file is proven; see `runtimes.RUNTIMES`.
        activations: the signs of codes, and where values are rounded; a target of `StaticInt8`.
        kernels: the runtime whose own kernels it may call, beside the standard's; empty if there is none.
    """

    suffix: str
    runtime: str
    activations: str
    kernels: str = ""


FORMATS = {
    "onnxruntime": Format(".onnx", "onnxruntime", "onnxruntime", "onnxruntime"),
    "openvino": Format(".onnx", "openvino", "openvino", "openvino"),
    "tensorrt": Format(".onnx", "onnxruntime", "tensorrt"),
    "torch": Format(".pt2", "torch", "onnxruntime"),
    "executorch": Format(".pte", "executorch", "executorch"),
}


def resolve_target(path: str | Path, target: str | None) -> str:
    """Return the target of a path, which its suffix says where none is named.

    Raises:
        CompressionError: it has no such name, or the path another suffix.

    Example:
        >>> resolve_target("model.onnx", None), resolve_target("model.onnx", "openvino")
        ('onnxruntime', 'openvino')
    """
    if not isinstance(path, str | Path):
        raise invalid("path", "be the path of a file", path)
    suffix = Path(path).suffix
    suffixes = {known.suffix: name for name, known in reversed(FORMATS.items())}
    if target is None:
        if suffix not in suffixes:
            raise invalid("path", f"end in {', '.join(sorted(suffixes))}", str(path))
        return suffixes[suffix]
    if not isinstance(target, str) or target not in FORMATS:
        raise invalid("target", f"be one of {', '.join(FORMATS)}", target, nearest(str(target), FORMATS))
    if suffix != FORMATS[target].suffix:
        raise invalid("path", f"end in {FORMATS[target].suffix} for target={target!r}", str(path))
    return target


def refuse_unready(path: str | Path, target: str) -> None:
    """Raise `CompressionError` where a file can't be written, or its runtime isn't installed; nothing is made."""
    RUNTIMES[FORMATS[target].runtime].require()
    file = Path(path).absolute()
    folder = next(parent for parent in file.parents if parent.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        reason = "It is a folder." if file.is_dir() else f"Nothing can be written into {folder}."
        raise invalid("path", "be a file that can be written", str(path), reason)
