"""Flows: how static int8 gets into a traced module; one for each upstream that could go away.

A flow is a module with the functions of `flow.Flow`. What would replace `torch.ao` for training, should it go, is one
more such file.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lightning_compress.errors import CompressionError
from lightning_compress.quantization.static.flows.flow import Flow

FLOWS = ("fx", "pt2e")


def load(name: str) -> Flow:
    """Return the flow called ``name``; its upstream, which takes seconds, is imported only now.

    Raises:
        CompressionError: its upstream isn't there.
    """
    try:
        flow: Any = import_module(f"{__name__}.{name}")
    except ImportError as error:
        raise CompressionError(f"`flow` must have its upstream installed. Received: flow={name!r}, {error}.") from error
    checked: Flow = flow
    return checked
