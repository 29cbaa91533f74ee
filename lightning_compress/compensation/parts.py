"""Attention and recurrent layers in parts: each of their matrices is called as a linear layer of its own.

The parts share the memory of the layer's parameters: what is written to one, the layer has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.compensation.layer_rows import LINEAR, has_own_forward
from lightning_compress.modules.attention_form import PACKED, AttentionForm, projections_of
from lightning_compress.modules.paths import compressible_modules
from lightning_compress.modules.routing import Form, route_


class Part(nn.Linear):
    """Multiplies with some rows of a layer's parameter, whose memory it shares.

    Attributes:
        parameter: the parameter's name in the model.
        first_row: the part's first row in it.
    """

    def __init__(self, parameter: str, weight: Tensor, bias: Tensor | None, first_row: int = 0) -> None:
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.parameter, self.first_row = parameter, first_row
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)  # type: ignore[assignment]


class AttentionInParts(AttentionForm):
    """Attends with projections that are layers of their own."""

    def __init__(self, layer: nn.MultiheadAttention, path: str = "") -> None:
        super().__init__({})
        biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        self.in_proj = nn.ModuleList()
        for name, weight in projections_of(layer).items():
            thirds = weight.chunk(3) if name == PACKED else [weight]
            for rows in thirds:
                first = 0 if name != PACKED else len(self.in_proj) * len(rows)
                self.in_proj.append(Part(f"{path}.{name}".lstrip("."), rows, biases[len(self.in_proj)], first))

    def part(self, index: int, x: Tensor, name: str, rows: slice, bias: Tensor | None) -> Tensor:
        projection: Tensor = self.in_proj[index](x)
        return projection


class RecurrentInParts(Form):
    """Computes `nn.LSTM`, `nn.GRU` or `nn.RNN` layer by layer, where each matrix is also called on what it multiplies.

    Those of the inputs are called on the layer's inputs, those of the states on the states before each step, as the
    layer computes them with the matrices of the inputs that it has by then.
    """

    def __init__(self, layer: nn.RNNBase, path: str = "") -> None:
        super().__init__({})
        self.parts = nn.ModuleDict()
        for name in _matrices(layer):
            bias = layer._parameters.get(name.replace("weight", "bias"))
            self.parts[name] = Part(f"{path}.{name}".lstrip("."), layer.get_parameter(name), bias)

    def forward(self, module: Any, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Compute what the layer does, in evaluation."""
        is_lstm, is_packed = module.mode == "LSTM", isinstance(input, PackedSequence)
        if is_packed:
            data, sizes, order, back = input
        else:
            steps = input.unsqueeze(1) if input.dim() == 2 else input.transpose(0, 1) if module.batch_first else input
            data, sizes, order, back = steps.flatten(0, 1), torch.full((len(steps),), steps.shape[1]), None, None
        states = None if hx is None else [hx] if not is_lstm else list(hx)
        if states is not None:
            states = [state.unsqueeze(1) if state.dim() == 2 else state for state in states]
            states = states if order is None else [state.index_select(1, order) for state in states]
        else:
            count = module.num_layers * (1 + module.bidirectional)
            states = [data.new_zeros(count, int(sizes[0]), module.hidden_size) for _ in range(1 + is_lstm)]
        data, lasts = self._layers(module, data, sizes, states)
        if is_packed:
            output: Any = PackedSequence(data, sizes, order, back)
            lasts = lasts if back is None else [last.index_select(1, back) for last in lasts]
        else:
            output = data.unflatten(0, (len(sizes), -1))
            output = output.transpose(0, 1) if module.batch_first and input.dim() == 3 else output
            if input.dim() == 2:
                output, lasts = output.squeeze(1), [last.squeeze(1) for last in lasts]
        return output, tuple(lasts) if is_lstm else lasts[0]

    def _layers(self, module: Any, data: Tensor, sizes: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        directions, lasts = 1 + module.bidirectional, list[list[Tensor]]()
        for number in range(module.num_layers):
            places = slice(number * directions, (number + 1) * directions)
            own = [state[places] for state in states]
            suffixes = [f"_l{number}", f"_l{number}_reverse"][:directions]
            for suffix in suffixes:
                self.parts[f"weight_ih{suffix}"](data)
            output, _ = self._layer(module, suffixes, data, sizes, own)
            for suffix, start, seen in zip(suffixes, own[0], output.chunk(directions, dim=1), strict=True):
                self.parts[f"weight_hh{suffix}"](_before(seen, sizes, start, suffix.endswith("reverse")))
            data, last = self._layer(module, suffixes, data, sizes, own)
            lasts.append(last)
        return data, [torch.cat(parts) for parts in zip(*lasts, strict=True)]

    def _layer(
        self, module: Any, suffixes: Sequence[str], data: Tensor, sizes: Tensor, states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
        flat = [module._parameters[name + suffix] for suffix in suffixes for name in names]
        kernel: Any = getattr(torch, module.mode.lower())
        hidden = states if module.mode == "LSTM" else states[0]
        output, *last = kernel(data, sizes, hidden, flat, module.bias, 1, 0.0, False, module.bidirectional)
        return output, last


def _before(states: Tensor, sizes: Tensor, start: Tensor, is_reverse: bool) -> Tensor:
    """Return the state before each step, of states ``(sum of sizes, hidden)`` that are laid out step by step."""
    steps = list(states.split(sizes.tolist()))
    if is_reverse:
        after = [*steps[1:], start[:0]]
        return torch.cat(
            [torch.cat([late, start[len(late) : len(now)]]) for now, late in zip(steps, after, strict=True)]
        )
    return torch.cat([start[: len(steps[0])], *(early[: len(now)] for early, now in pairwise(steps))])


def _matrices(layer: nn.RNNBase) -> Iterator[str]:
    return (name for name in layer._parameters if name.startswith(("weight_ih", "weight_hh")))


def why_whole(layer: nn.Module) -> str:
    """Say why an attention or recurrent layer can't be called in parts; empty if it can."""
    if any(parameter is not None and not parameter.numel() for parameter in layer._parameters.values()):
        return "it has left with a block"
    if isinstance(layer, nn.MultiheadAttention | nn.RNNBase) and has_own_forward(layer):
        return "its class has a forward of its own"
    if isinstance(layer, nn.MultiheadAttention) and (layer.bias_k is not None or layer.add_zero_attn):
        return "it adds keys of its own (add_bias_kv, add_zero_attn)"
    if isinstance(layer, nn.RNNBase) and (layer.proj_size or len(list(_matrices(layer))) != _count(layer)):
        return "its states are projected, or its weights computed"
    return ""


def _count(layer: nn.RNNBase) -> int:
    return 2 * layer.num_layers * (1 + layer.bidirectional)


def linear_parts_(model: nn.Module) -> dict[str, nn.Module]:
    """Let attention and recurrent layers compute in parts; return all layers that are a matrix, by path.

    A part's path is the layer's and the parameter's, with a number where there are several in one.
    """
    found: dict[str, nn.Module] = {}
    for path, layer in compressible_modules(model).items():
        if why_whole(layer):
            continue
        if isinstance(layer, nn.MultiheadAttention):
            route_(layer, attention := AttentionInParts(layer, path))
            projections: Any = enumerate(attention.in_proj)
            found |= {f"{part.parameter}.{number}": part for number, part in projections}
        elif isinstance(layer, nn.RNNBase):
            route_(layer, recurrent := RecurrentInParts(layer, path))
            matrices: Any = recurrent.parts.values()
            found |= {part.parameter: part for part in matrices}
        elif isinstance(layer, LINEAR):
            found[path] = layer
    return found


def parameter_of(path: str, layer: nn.Module) -> str:
    """Return the name of the parameter that a layer or part at a path multiplies with."""
    return layer.parameter if isinstance(layer, Part) else f"{path}.weight".lstrip(".")
