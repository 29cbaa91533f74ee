"""Dynamic int8 LSTM and GRU: int8 weights, hidden states quantized at each step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.errors import invalid
from lightning_compress.modules.routing import Form
from lightning_compress.modules.written import file_kernels
from lightning_compress.quantization.layers.int8_weight import Int8Weight
from lightning_compress.quantization.layers.kernel_cache import KernelCache
from lightning_compress.quantization.layers.linear import in_plain_operators, packed_kernel
from lightning_compress.quantization.numerics.operators import LSTM

_HALF_ENGINES = ("x86", "fbgemm")
"""The engines of torch that multiply float activations with 16-bit weights."""


class DynamicRecurrent(Form):
    """Computes `nn.LSTM` or `nn.GRU` in evaluation, with ``gates = W_ih x_t + b_ih + Q(h_t-1) Q(W_hh)^T s + b_hh``.

    All weights are int8, with a scale for each row. The states ``h`` lie in (-1, 1): they are quantized per tensor at
    each step, also where they are the input of a next layer. The sequence itself may hold outliers, and this kernel
    has one scale for all steps, samples and channels of it; so the first layer multiplies it unquantized with its
    int8 weights, which the kernel holds in 16 bit. (Engines without such a kernel, ``onednn`` and ``qnnpack``,
    quantize it too.) Dropout between layers is a matter of training and left out.

    References:
        Appleyard et al., "Optimizing Performance of Recurrent Neural Networks on GPUs", 2016 (arXiv:1604.01946): the
        product with the input leaves the loop.
    """

    weights: Mapping[str, Int8Weight]  # type: ignore[assignment]

    def __init__(self, layer: nn.LSTM | nn.GRU, reduced: bool) -> None:
        names = [weight for cell in _cells(layer) for weight, _ in cell]
        super().__init__({name: Int8Weight.nearest(layer.get_parameter(name), reduced) for name in names})
        self._cells = KernelCache()

    def forward(self, module: Any, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Compute what the float layer does.

        Args:
            module: the float layer.
            input: ``(T, N, input_size)``, ``(N, T, input_size)`` if `batch_first`, ``(T, input_size)``, or packed.
            hx: ``(num_layers * directions, N, hidden_size)``, of an LSTM two of them; None is zeros.

        Returns:
            The last layer's states at all steps, laid out as ``input``, and all layers' last states, as ``hx``.

        Raises:
            CompressionError: the initial states have another shape.
        """
        self.bind_(module)
        is_lstm = isinstance(module, nn.LSTM)
        states = None if hx is None else list(hx) if is_lstm else [hx]
        if isinstance(input, PackedSequence):
            steps, sizes, order, back = input
            output, states = self._run(module, steps, states and _reordered(states, order), sizes)
            result: Any = PackedSequence(output, sizes, order, back)
            states = _reordered(states, back)
        elif input.dim() == 2:
            output, states = self._run(module, input.unsqueeze(1), states and [state.unsqueeze(1) for state in states])
            result, states = output.squeeze(1), [state.squeeze(1) for state in states]
        elif module.batch_first:
            output, states = self._run(module, input.transpose(0, 1), states)
            result = output.transpose(0, 1)
        else:
            result, states = self._run(module, input, states)
        return result, tuple(states) if is_lstm else states[0]

    def _run(
        self, module: Any, steps: Tensor, states: list[Tensor] | None, sizes: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the kernel on ``(T, N, input_size)`` or packed steps: all states of the last layer, last ones of all."""
        is_lstm = isinstance(module, nn.LSTM)
        batch = steps.shape[1] if sizes is None else int(sizes[0])
        shape = (len(self.weights) // 2, batch, module.hidden_size)
        if states is None:
            states = [torch.zeros(shape, device=steps.device)] * (1 + is_lstm)
        elif [state.shape for state in states] != [shape] * (1 + is_lstm):
            raise invalid("hx", f"hold {1 + is_lstm} of shape {shape}", [tuple(state.shape) for state in states])
        hidden: Any = [state.float() for state in states]
        # In the kernels' order: layers, dropout, training, directions and, of padded sequences, batch_first.
        options = (module.num_layers, 0.0, False, module.bidirectional, *((False,) if sizes is None else ()))
        data = (steps.float(),) if sizes is None else (steps.float(), sizes)
        biases = [
            module._parameters[name].float() if module.bias else None for cell in _cells(module) for _, name in cell
        ]
        if file_kernels() == "onnxruntime" and is_lstm and sizes is None:
            output, last = self._in_file(module, steps.float(), hidden, biases)
        elif in_plain_operators(steps):
            run: Any = torch.lstm if is_lstm else torch.gru
            values = [weight.values() for weight in self.weights.values()]
            output, *last = run(*data, *([hidden] if is_lstm else hidden), _flat(values, biases), module.bias, *options)
        else:
            weights, biases = list(self.weights.values()), [None if bias is None else bias.detach() for bias in biases]
            stored = [tensor for weight in weights for tensor in (weight.codes, weight.scale)]
            cells = self._cells.made(stored, biases, lambda: _packed(weights, biases, module.bidirectional))
            if is_lstm:
                kind = {"dtype": torch.qint8, "use_dynamic": True}
                output, *last = torch.quantized_lstm(*data, hidden, cells, True, *options, **kind)
            else:
                output, *last = torch.quantized_gru(*data, *hidden, cells, True, *options)
        return output.to(steps.dtype), [state.to(steps.dtype) for state in last]

    def _in_file(self, module: Any, steps: Tensor, hidden: list[Tensor], biases: list[Any]) -> tuple[Tensor, list[Any]]:
        """Run layer by layer, all but the first in the kernel of a file's runtime.

        It has one scale for all of a sequence, too: outliers in that of the first layer would leave others no steps.
        """
        weights, lasts = list(self.weights.values()), []
        biases = [torch.zeros_like(w.scale) if b is None else b for w, b in zip(weights, biases, strict=True)]
        directions = 1 + module.bidirectional
        for layer in range(module.num_layers):
            cells = slice(2 * directions * layer, 2 * directions * (layer + 1))
            states = [state[directions * layer : directions * (layer + 1)] for state in hidden]
            if layer == 0:
                flat = _flat([weight.values() for weight in weights[cells]], biases[cells])
                steps, *last = torch.lstm(steps, states, flat, True, 1, 0.0, False, module.bidirectional, False)
            else:
                codes, scales = ([getattr(weight, part) for weight in weights[cells]] for part in ("codes", "scale"))
                steps, *last = LSTM(steps, codes, scales, biases[cells], *states)
            lasts.append(last)
        return steps, [torch.cat(parts) for parts in zip(*lasts, strict=True)]


def _cells(layer: nn.LSTM | nn.GRU) -> Iterator[list[tuple[str, str]]]:
    """Yield names of the weights and biases of a cell, in the kernel's order: by layer, forward before reverse."""
    for index in range(layer.num_layers):
        for direction in ("", "_reverse")[: 1 + layer.bidirectional]:
            yield [(f"weight_{kind}_l{index}{direction}", f"bias_{kind}_l{index}{direction}") for kind in ("ih", "hh")]


def _flat(weights: list[Tensor], biases: list[Any]) -> list[Tensor]:
    """Return tensors of all cells as torch's float layers take them."""
    cells = range(0, len(weights), 2)
    parts = [
        weights[cell : cell + 2] + [bias for bias in biases[cell : cell + 2] if bias is not None] for cell in cells
    ]
    return [tensor for part in parts for tensor in part]


def _packed(weights: list[Int8Weight], biases: list[Tensor | None], bidirectional: bool) -> list[Any]:
    """Return the kernel's own form of the weights: a cell for each layer and direction."""
    unquantized = 1 + bidirectional if torch.backends.quantized.engine in _HALF_ENGINES else 0
    cells = []
    for cell in range(0, len(weights), 2):
        (ih, hh), (bias_ih, bias_hh) = (
            weights[cell : cell + 2],
            (
                torch.zeros_like(weight.scale) if bias is None else bias
                for weight, bias in zip(weights[cell : cell + 2], biases[cell : cell + 2], strict=True)
            ),
        )
        if cell < 2 * unquantized:
            inputs = torch.ops.quantized.linear_prepack_fp16(ih.values(), bias_ih)
        else:
            inputs = packed_kernel(ih.codes, ih.scale, bias_ih)
        states = packed_kernel(hh.codes, hh.scale, bias_hh)
        make = torch.ops.quantized.make_quantized_cell_params_dynamic
        cells.append(make(inputs, states, bias_ih, bias_hh, False))
    return cells


def _reordered(states: list[Tensor], order: Tensor | None) -> list[Tensor]:
    return states if order is None else [state.index_select(1, order) for state in states]
