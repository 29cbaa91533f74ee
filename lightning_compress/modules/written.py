"""For whom does a module compute: for this process, for a compiler or exporter of torch's, for a file of ours?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_KERNELS: ContextVar[str | None] = ContextVar("kernels", default=None)


def needs_plain_operators() -> bool:
    """Tell whether a run is compiled, exported or traced: what stands in it must be known outside of this process."""
    return torch.compiler.is_compiling() or bool(torch.jit.is_tracing()) or writes_file()  # type: ignore[attr-defined, no-untyped-call]


def writes_file() -> bool:
    """Tell whether a run is to become a file: quantized layers call the operators that it is made of."""
    return not torch.compiler.is_dynamo_compiling() and _KERNELS.get() is not None  # dynamo reads no such variable


def file_kernels() -> str:
    """Name the runtime whose own kernels the file may call: ``onnxruntime``, ``openvino``; empty if there is none."""
    return "" if torch.compiler.is_dynamo_compiling() else _KERNELS.get() or ""


@contextmanager
def writing_file(kernels: str = "") -> Iterator[None]:
    """Let quantized layers call operators of this package, which stand for what a runtime has kernels for.

    They run in this process too, so that a file can be compared with the very model.

    Args:
        kernels: the runtime whose own kernels, beside the standard's, the file may call.
    """
    token = _KERNELS.set(kernels)
    try:
        yield
    finally:
        _KERNELS.reset(token)
