"""Dynamic int8 linear layers: int8 weights, activations quantized per token as they come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.schemes import DynamicInt8, needs_reduced_range
from lightning_compress.quantization.traced import refuse_to_move
from lightning_compress.quantization.units import tied_to_float, without_kernel
from lightning_compress.targets import Targets, compressible_modules


class DynamicLinear(nn.Module):
    """``y = (Q(x / s) Q(W)^T) s + b`` with ``s = max|x|`` of each row of x and a weight scale for each output channel.

    The kernel (`torch.ops.quantized.linear_dynamic`) quantizes activations per tensor; on rows that were divided by
    their own largest magnitude first, per tensor is per row.

    Args:
        weight: float, ``(out_features, in_features)``.
        bias: ``(out_features,)`` or None.
        reduce_range: 7-bit activations, for CPUs without VNNI.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    used = frozenset(("weight", "bias"))
    """Names of the float layer's tensors that it takes the place of."""

    def __init__(self, weight: Tensor, bias: Tensor | None, reduce_range: bool) -> None:
        super().__init__()
        scale = weight.detach().float().abs().amax(dim=1).clamp_min(1e-12) / 127
        self.register_buffer("weight", (weight.detach().float() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.reduce_range = reduce_range
        self._packed: Any = None

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: DynamicInt8) -> DynamicLinear:
        """The dynamic form of a linear layer, on the CPU."""
        reduce = needs_reduced_range() if scheme.reduce_range is None else scheme.reduce_range
        bias = None if linear.bias is None else linear.bias.cpu()
        return cls(linear.weight.cpu(), bias, reduce)

    def forward(self, x: Tensor) -> Tensor:
        if self._packed is None:
            # Packing is done once the weights have been loaded, and holds a copy in the kernel's own order.
            quantized = torch._make_per_channel_quantized_tensor(
                self.weight, self.scale.double(), torch.zeros(len(self.scale), dtype=torch.long), 0
            )
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        rows = x.float()
        largest = rows.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        product: Tensor = torch.ops.quantized.linear_dynamic(rows / largest, self._packed, self.reduce_range)
        product = product.mul_(largest)
        return (product if self.bias is None else product.add_(self.bias)).to(x.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        refuse_to_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


def linears(model: nn.Module, targets: Targets | None) -> tuple[list[str], dict[str, str]]:
    """Paths of the linear layers to make dynamic, and of those that stay float with the reason."""
    chosen, floats, tied = [], {}, tied_to_float(model)
    if targets is not None:
        targets.check_patterns(model)
    for path, module in compressible_modules(model).items():
        if type(module) is nn.Linear:
            if path in tied:
                floats[path] = tied[path]
                continue
            reason = targets.leaves_out(path) if targets is not None else ""
            if targets is not None and targets.types is not None and not isinstance(module, tuple(targets.types)):
                reason = "not of the targeted types"
            if reason:
                floats[path] = reason
            else:
                chosen.append(path)
        elif isinstance(module, nn.MultiheadAttention):
            floats[path] = "its projections are read by a fused kernel, not called"
        elif isinstance(module, (nn.RNNBase, nn.modules.conv._ConvNd)):
            floats[path] = f"dynamic int8 is for linear layers, not {type(module).__name__}"
    return chosen, without_kernel(model) | floats


_FAST_PATH = "_fast_path_activation"


def quiet_fast_path_(model: nn.Module) -> None:
    """Keep `nn.TransformerEncoderLayer` from its fused path in evaluation, which reads weights and calls no layers."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer) or _FAST_PATH in vars(module):
            continue
        if any(isinstance(child, DynamicLinear) for child in module.modules()):
            module.__dict__[_FAST_PATH] = module.activation_relu_or_gelu
            module.activation_relu_or_gelu = 0


def restore_fast_path_(model: nn.Module) -> None:
    """Undo `quiet_fast_path_`."""
    for module in model.modules():
        if _FAST_PATH in vars(module):
            module.activation_relu_or_gelu = module.__dict__.pop(_FAST_PATH)
