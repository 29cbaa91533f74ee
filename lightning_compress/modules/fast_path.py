"""How is torch kept from the fused path of its transformer layers, which reads weights and calls no layers?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_compress.modules.routing import routed_modules

_FAST_PATH = "_fast_path"
_SWITCHES = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""The layers that have such a path, with the attribute that is false where one can't take it."""


def quiet_fast_path_(model: nn.Module) -> None:
    """Keep torch's transformer encoders from their fused path, if anything in them has a quantized form."""
    for module in model.modules():
        for kind, switch in _SWITCHES.items():
            if not isinstance(module, kind) or _FAST_PATH in vars(module):
                continue
            if routed_modules(module):
                module.__dict__[_FAST_PATH] = (switch, getattr(module, switch))
                setattr(module, switch, 0)


def restore_fast_path_(model: nn.Module) -> None:
    """Undo `quiet_fast_path_`."""
    for module in model.modules():
        if _FAST_PATH in vars(module):
            setattr(module, *module.__dict__.pop(_FAST_PATH))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Run the block without that path anywhere, so that every layer is called."""
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        yield
