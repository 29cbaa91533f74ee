"""Follows torch's recurrences as wholes: one hidden width through all gates, layers and directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from lightning_compress.channels.tracing.notes import Size
from lightning_compress.channels.tracing.tracer import Tracer, spread
from lightning_compress.modules.outputs import tensors_in

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class Recurrences(TorchFunctionMode):
    """Lets torch's recurrent functions run out of the tracer's sight, which is told what their widths are."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = str(getattr(func, "__name__", ""))
        gates = _GATES.get(kind.removesuffix("_cell"))
        if gates is None or kwargs:
            return func(*args, **(kwargs or {}))
        with _disable_current_modes():
            out = func(*args)
        if kind.endswith("_cell"):
            states, weights, layers, both = args[1], [weight for weight in args[2:] if weight is not None], 1, False
        else:  # of a packed sequence the lengths stand behind the data
            states, weights, _, layers, _, _, both = args[1 if isinstance(args[3], bool) else 2 :][:7]
        _follow(self.tracer, args[0], states, weights, gates, 1 + both, layers, out)
        return out


def _follow(
    tracer: Tracer,
    data: Tensor,
    states: Any,
    weights: Sequence[Tensor],
    gates: int,
    directions: int,
    layers: int,
    out: Any,
) -> None:
    """Tell the tracer what its arguments say of a recurrence; weights are in torch's order, layer by layer."""
    size, per_layer = len(weights[0]) // gates, len(weights) // (directions * layers)
    if weights[1].shape[1] != size:
        tracer.freeze((data, weights, states, out), f"a projected recurrent state, in {tracer.where()}")
        return
    hidden = tracer.sets.new(size)
    steps = data.numel() // data.shape[-1]
    for place, weight in enumerate(weights):
        rows = tracer.along(weight, 0)
        if rows is not None:
            tracer.sets.union(rows.view(-1, size), hidden)
        if weight.dim() == 1:
            continue
        if place % per_layer == 0 and place < directions * per_layer:  # the first layer takes the data
            columns = tracer.same((data, -1), (weight, 1))
        else:
            columns = tracer.along(weight, 1)
            if columns is not None:
                tracer.sets.union(columns.view(-1, size), hidden)
        tracer.costs(steps * weight.numel(), hidden, columns)
    for state in tensors_in(states):
        if (width := tracer.along(state, -1)) is not None:
            tracer.sets.union(width, hidden)
        else:  # made by whoever called, perhaps by a number that follows: verification will tell
            for path in tracer.stack[-2:]:
                tracer.sizes.append(Size(path, size, hidden))
    for tensor in tensors_in(out):  # that of two directions stands side by side
        width = hidden.repeat(tensor.shape[-1] // size)
        tracer.set(tensor, spread(width, -1, tensor.dim()))
