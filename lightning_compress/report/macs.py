"""How many multiply-accumulates does a model do? It is run, and every operator that reaches the kernels counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_compress.distillation.calling import call
from lightning_compress.modules.isolation import isolated_inference
from lightning_compress.report.storage import packed_weights

_TRANSPARENT = ("aten", "onednn", "prim", "prims", "profiler", "quantized", "quantized_decomposed", "torchvision")
# Fused operators of aten that multiply and have no formula here.
_OPAQUE = ("_trilinear", "mkldnn_rnn_layer", "_cudnn_rnn", "miopen_rnn", "_native_multi_head_attention",
           "_transformer_encoder_layer_fwd")  # fmt: skip


def count_macs(model: nn.Module, inputs: Any) -> tuple[int, tuple[str, ...]]:
    """Run ``model`` once on ``inputs`` and count its multiply-accumulates.

    Matrix products, convolutions (transposed and grouped too), attention and recurrent cells count, in float and in
    int8: a convolution with ``out`` output elements does ``out * in_channels / groups * kH * kW`` of them. Additions of
    a bias, norms and element-wise operators don't.

    Returns:
        The count, and the names of operators that may multiply but have no formula: the count is then a lower bound.

    Example:
        >>> count_macs(nn.Linear(10, 5), torch.ones(1, 10))
        (50, ())
    """
    with isolated_inference(model), counted() as counter:
        call(model, inputs)
    return counter.macs, tuple(sorted(counter.uncounted))


@contextmanager
def counted() -> Iterator[Counter]:
    """Count the multiply-accumulates of what runs in the block, in kernels that can be counted."""
    counter = Counter()
    with _plain_kernels(), counter:
        yield counter


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Keep torch from fusing attention, encoder layers and recurrent layers into operators that can't be counted."""
    # Single switches, because the `flags` of torch.backends also write settings of TF32, which can warn.
    switches = (
        (torch.backends.mha.get_fastpath_enabled(), torch.backends.mha.set_fastpath_enabled),
        (torch._C._get_mkldnn_enabled(), torch._C._set_mkldnn_enabled),
        (torch._C._get_cudnn_enabled(), torch._C._set_cudnn_enabled),
    )
    with ExitStack() as stack, torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH):
        for before, switch in switches:
            stack.callback(switch, before)
            switch(False)
        yield


class Counter(TorchDispatchMode):
    """Counts multiply-accumulates, and names operators that may multiply and have no formula."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            # Under inference mode a linear layer arrives here whole, and not as the product that it is made of.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        namespace, name = func.namespace, func._schema.name.rpartition("::")[2]
        try:
            self.macs += self._macs_of(func, namespace, name, args, kwargs, out)
        except Exception:  # of a formula, by a shape that it doesn't foresee
            self.uncounted.add(f"{namespace}.{name}")
        return out

    def _macs_of(self, func: Any, namespace: str, name: str, args: Any, kwargs: Any, out: Any) -> int:
        if func._overloadpacket in flop_registry:
            return int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)) // 2
        if (formula := _formula(namespace, name)) is not None:
            return formula(args, out)
        packed = any(isinstance(argument, torch.ScriptObject) for argument in args)
        if namespace not in _TRANSPARENT or name in _OPAQUE or packed:
            self.uncounted.add(f"{namespace}.{name}")
        return 0


_Formula = Callable[[Any, Any], int]


def _formula(namespace: str, name: str) -> _Formula | None:
    if namespace == "aten":
        return _ATEN.get(name)
    if namespace not in ("quantized", "onednn") or "prepack" in name or "unpack" in name:
        return None
    if name.startswith(("linear", "qlinear")) or name == "matmul":
        return _matrix_product
    if name.startswith("qconv"):
        return _int8_conv
    if name.startswith("conv_transpose"):
        return _quantized_conv_transpose
    return _quantized_conv if name.startswith("conv") else None


def _weight(args: Any) -> Tensor:
    # The weight is the largest tensor in the packed object: the others are the bias and the convolution's settings.
    packed = next(argument for argument in args if isinstance(argument, torch.ScriptObject))
    return max(packed_weights(packed), key=lambda tensor: tensor.numel() * (tensor.ndim > 1))


def _int8_conv(args: Any, out: Tensor) -> int:
    return out.numel() // out.shape[1] * int(args[3].numel())  # its weight, in an order of its own


def _quantized_conv(args: Any, out: Tensor) -> int:
    return out.numel() * math.prod(_weight(args).shape[1:])


def _quantized_conv_transpose(args: Any, out: Tensor) -> int:
    return int(args[0].numel()) * math.prod(_weight(args).shape[1:])


def _quantized_recurrent(args: Any, out: Any) -> int:
    steps = args[0].numel() // args[0].shape[-1]
    cells = [cell for argument in args if isinstance(argument, (list, tuple)) for cell in argument]
    weights = [tensor for cell in cells if isinstance(cell, torch.ScriptObject) for tensor in packed_weights(cell)]
    return int(steps * sum(weight.numel() for weight in weights if weight.ndim == 2))


def _matrix_product(args: Any, out: Tensor) -> int:
    return int(args[0].shape[-1]) * out.numel()


_ATEN: dict[str, _Formula] = {
    "_int_mm": _matrix_product,
    "_weight_int4pack_mm_for_cpu": _matrix_product,
    "mv": lambda args, out: int(args[0].numel()),
    "addmv": lambda args, out: int(args[1].numel()),
    "dot": lambda args, out: int(args[0].numel()),
    "quantized_lstm": _quantized_recurrent,
    "quantized_gru": _quantized_recurrent,
}
