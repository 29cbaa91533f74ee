"""Sessions as `docs/onnxruntime.md` tells users to open them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from lightning_compress.quantization.numerics.int8 import has_vnni


def open_session(path: str | Path, settings: Any = None) -> Any:
    """Open a file on the CPU, with sums of 8-bit products that don't overflow where VNNI is missing."""
    settings = settings or onnxruntime.SessionOptions()
    if not has_vnni():
        settings.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
