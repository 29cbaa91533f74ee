"""Dynamic int8 LSTM and GRU: int8 weights, hidden states quantized at each step."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_compress.errors import invalid
from lightning_compress.quantization.layers.linear import DynamicLinear

_HALF_ENGINES = ("x86", "fbgemm")
"""The engines of torch that multiply float activations with 16-bit weights."""


class DynamicRecurrent(nn.Module):
    """Computes `nn.LSTM` or `nn.GRU` in evaluation, with ``gates = W_ih x_t + b_ih + Q(h_t-1) Q(W_hh)^T s + b_hh``.

    All weights are int8, with a scale for each row. The states ``h`` lie in (-1, 1): they are quantized per tensor at
    each step, also where they are the input of a next layer. The sequence itself may hold outliers, and this kernel
    has one scale for all steps, samples and channels of it; so the first layer multiplies it unquantized with its
    int8 weights, which the kernel holds in 16 bit. (Engines without such a kernel, ``onednn`` and ``qnnpack``,
    quantize it too.) Dropout between layers is a matter of training and left out.

    Args:
        layer: float, on any device; it isn't changed.
        reduce_range: 7-bit weights, for CPUs without VNNI.

    Example:
        >>> lstm = nn.LSTM(8, 16, batch_first=True)
        >>> recurrent = DynamicRecurrent(lstm, reduce_range=False)
        >>> output, (h, c) = recurrent(torch.randn(2, 5, 8))
        >>> output.shape, h.shape, recurrent.hh[0].weight.dtype
        (torch.Size([2, 5, 16]), torch.Size([1, 2, 16]), torch.int8)

    References:
        Appleyard et al., "Optimizing Performance of Recurrent Neural Networks on GPUs", 2016 (arXiv:1604.01946): the
        product with the input leaves the loop.
    """

    def __init__(self, layer: nn.LSTM | nn.GRU, reduce_range: bool) -> None:
        super().__init__()
        self.mode, self.hidden_size, self.num_layers = layer.mode, layer.hidden_size, layer.num_layers
        self.bidirectional, self.batch_first = layer.bidirectional, layer.batch_first
        self.used: frozenset[str] = frozenset()
        """Names of the float layer's tensors that it takes the place of."""
        # In the kernel's order: by layer, forward before reverse. These layers only hold weights, they aren't called.
        self.ih, self.hh = nn.ModuleList(), nn.ModuleList()
        for index in range(self.num_layers):
            for direction in ("", "_reverse")[: 1 + self.bidirectional]:
                for kind, held in (("ih", self.ih), ("hh", self.hh)):
                    weight, bias = f"weight_{kind}_l{index}{direction}", f"bias_{kind}_l{index}{direction}"
                    values = getattr(layer, bias).cpu() if layer.bias else None
                    held.append(DynamicLinear(getattr(layer, weight).cpu(), values, reduce_range))
                    self.used |= {weight, bias} if layer.bias else {weight}
        self._packed: list[Any] | None = None

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Compute what the float layer does.

        Args:
            input: ``(T, N, input_size)``, ``(N, T, input_size)`` if `batch_first`, ``(T, input_size)``, or packed.
            hx: ``(num_layers * directions, N, hidden_size)``, of an LSTM two of them; None is zeros.

        Returns:
            The last layer's states at all steps, laid out as ``input``, and all layers' last states, as ``hx``.

        Raises:
            CompressionError: the initial states have another shape.
        """
        states = None if hx is None else list(hx) if self.mode == "LSTM" else [hx]
        if isinstance(input, PackedSequence):
            steps, sizes, order, back = input
            output, states = self._run(steps, states and _reordered(states, order), sizes)
            result: Any = PackedSequence(output, sizes, order, back)
            states = _reordered(states, back)
        elif input.dim() == 2:
            output, states = self._run(input.unsqueeze(1), states and [state.unsqueeze(1) for state in states])
            result, states = output.squeeze(1), [state.squeeze(1) for state in states]
        elif self.batch_first:
            output, states = self._run(input.transpose(0, 1), states)
            result = output.transpose(0, 1)
        else:
            result, states = self._run(input, states)
        return result, tuple(states) if self.mode == "LSTM" else states[0]

    def _run(
        self, steps: Tensor, states: list[Tensor] | None, sizes: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the kernel on ``(T, N, input_size)`` or packed steps: all states of the last layer, last ones of all."""
        is_lstm = self.mode == "LSTM"
        shape = (len(self.hh), steps.shape[1] if sizes is None else int(sizes[0]), self.hidden_size)
        if states is None:
            states = [torch.zeros(shape)] * (1 + is_lstm)
        elif [state.shape for state in states] != [shape] * (1 + is_lstm):
            raise invalid("hx", f"hold {1 + is_lstm} of shape {shape}", [tuple(state.shape) for state in states])
        if self._packed is None:
            self._packed = self._pack()
        hidden: Any = [state.float() for state in states]
        # In the kernels' order: biases, layers, dropout, training, directions and, of padded sequences, batch_first.
        padded = (False,) if sizes is None else ()
        options = (self._packed, True, self.num_layers, 0.0, False, self.bidirectional, *padded)
        data = (steps.float(),) if sizes is None else (steps.float(), sizes)
        if is_lstm:
            output, *last = torch.quantized_lstm(*data, hidden, *options, dtype=torch.qint8, use_dynamic=True)
        else:
            output, *last = torch.quantized_gru(*data, *hidden, *options)
        return output.to(steps.dtype), [state.to(steps.dtype) for state in last]

    def _pack(self) -> list[Any]:
        """Return the kernel's own form of the weights: a cell for each layer and direction."""
        unquantized = 1 + self.bidirectional if torch.backends.quantized.engine in _HALF_ENGINES else 0
        cells, ih, hh = [], cast("list[DynamicLinear]", self.ih), cast("list[DynamicLinear]", self.hh)
        for index, (inputs, states) in enumerate(zip(ih, hh, strict=True)):
            kernels = [_half(inputs) if index < unquantized else inputs.pack(_bias(inputs)), states.pack(_bias(states))]
            cell = torch.ops.quantized.make_quantized_cell_params_dynamic
            cells.append(cell(*kernels, _bias(inputs), _bias(states), False))
        return cells

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


def _reordered(states: list[Tensor], order: Tensor | None) -> list[Tensor]:
    return states if order is None else [state.index_select(1, order) for state in states]


def _bias(linear: DynamicLinear) -> Tensor:
    return torch.zeros_like(linear.scale) if linear.bias is None else linear.bias


def _half(linear: DynamicLinear) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(linear.weight * linear.scale[:, None], _bias(linear))
