"""Recurrent layers and cells are followed as wholes: one hidden width through all gates, layers and directions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import _disable_current_modes

from lightning_compress.channels.outputs import tensors_in
from lightning_compress.channels.tracer import Size, Tracer, spread

Recurrent = nn.RNNBase | nn.RNNCellBase


def opaque(tracer: Tracer, layer: Recurrent) -> Callable[[], None]:
    """Let a recurrent layer run out of the tracer's sight, which is told what its widths are; returns the way back."""
    own = layer.forward
    signature = inspect.signature(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            out = own(*args, **kwargs)
        # A subclass may take other arguments too, such as lengths; whether it may be followed so, the trial will tell.
        given = signature.bind(*args, **kwargs).arguments
        _follow(tracer, layer, next(iter(given.values()), None), given.get("hx"), out)
        return out

    layer.forward = forward
    return lambda: layer.__dict__.pop("forward", None)


def _follow(tracer: Tracer, layer: Recurrent, x: Any, state: Any, out: Any) -> None:
    data = x.data if isinstance(x, PackedSequence) else x
    if reason := _strange(layer, data, out):
        tracer.pin((data, list(layer.parameters()), state, out), f"{reason}, in {tracer.where()}")
        return
    hidden = _hidden(tracer, layer, data)
    states = [] if state is None else [state] if isinstance(state, Tensor) else list(state)
    for one in states:
        if tracer.along(one, -1) is not None:
            tracer.atoms.tie(tracer.along(one, -1), hidden)  # type: ignore[arg-type]
        else:  # made by whoever called, perhaps by a number that follows: the trial will tell
            tracer.sizes.append(Size(tracer.stack[-2], layer.hidden_size, hidden))
    features = [one for one in tensors_in(out) if one.is_floating_point()]  # a packed sequence holds more
    for one in features:  # that of two directions stands side by side
        width = hidden.repeat(one.shape[-1] // len(hidden))
        tracer.set(one, (spread(one.shape[-1], width, one.dim() - 1, one.dim()),))


def _strange(layer: Recurrent, data: Any, out: Any) -> str:
    """Why a layer can't be followed; empty if it can."""
    if getattr(layer, "proj_size", 0):
        return "a projected recurrent state"
    fits = isinstance(data, Tensor) and data.shape[-1] == layer.input_size
    widths = [found.shape[-1] for found in tensors_in(out) if found.is_floating_point()]
    if not fits or not widths or any(width % layer.hidden_size for width in widths):
        return "a forward that isn't torch's"
    return ""


def _hidden(tracer: Tracer, layer: Recurrent, data: Tensor) -> Tensor:
    """The hidden atoms, tied through all weights of the layer."""
    size = layer.hidden_size
    hidden = tracer.atoms.new(size)
    steps = data.numel() // data.shape[-1]
    for name, weight in layer.named_parameters():
        rows = tracer.along(weight, 0)
        if rows is not None:
            tracer.atoms.tie(rows.view(-1, size), hidden)
        columns = None
        if name.startswith("weight_ih_l0") or name == "weight_ih":
            columns = tracer.same((data, -1), (weight, 1))
        elif name.startswith("weight"):
            columns = tracer.along(weight, 1)
            if columns is not None:
                tracer.atoms.tie(columns.view(-1, size), hidden)
        if name.startswith("weight"):
            tracer.costs(steps * weight.numel(), hidden, columns)
    return hidden
