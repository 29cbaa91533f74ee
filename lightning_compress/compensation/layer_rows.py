"""A layer as a matrix: the rows that it multiplies in a call, and its weight as what they are multiplied with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

_CHECKED = 64
"""So many rows tell whether a call is that of a matrix."""
LINEAR = (nn.Linear, _ConvNd)
"""Layers whose output is their weight's matrix times rows of their input, plus a bias."""


def groups_of(layer: nn.Module) -> int:
    """Return how many matrices a layer has."""
    return layer.groups if isinstance(layer, _ConvNd) else 1


def input_dim(layer: nn.Module) -> int:
    """Return the dimension of a layer's weight that its inputs number."""
    return 0 if isinstance(layer, _ConvTransposeNd) else 1


def columns_of(layer: nn.Module) -> int:
    """Return how many columns its matrices have."""
    weight: Any = layer.weight
    if isinstance(layer, _ConvTransposeNd):
        return int(weight.numel() // weight.shape[1] // layer.groups)
    return int(weight[0].numel())


def matrix_of(layer: Any, weight: Tensor | None = None) -> Tensor:
    """Return a layer's weight, or a tensor of its shape, as ``(groups, rows, columns)``.

    Example:
        >>> matrix_of(nn.Conv1d(4, 6, 3, groups=2)).shape, matrix_of(nn.Linear(4, 6)).shape
        (torch.Size([2, 3, 6]), torch.Size([1, 6, 4]))
    """
    shown: Tensor = layer.weight.detach() if weight is None else weight
    if isinstance(layer, _ConvTransposeNd):
        kernel = list(range(3, shown.dim() + 1))
        shown = shown.unflatten(0, (layer.groups, -1)).transpose(1, 2).flip(kernel).flatten(3)
        return shown.flatten(2)
    return shown.reshape(groups_of(layer), -1, columns_of(layer))


def weight_from(layer: nn.Module, matrix: Tensor) -> Tensor:
    """Return a matrix in the layout of the layer's weight: what `matrix_of` is undone by."""
    weight: Any = layer.weight
    if isinstance(layer, _ConvTransposeNd):
        kernel = weight.shape[2:]
        split: Tensor = matrix.reshape(layer.groups, weight.shape[1], -1, *kernel)
        return split.flip(list(range(3, split.dim()))).transpose(1, 2).reshape(weight.shape)
    return matrix.reshape(weight.shape)


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Return a view of a call's input ``(samples, *positions, groups, *columns)``, one position for each row."""
    if not isinstance(layer, _ConvNd):
        return x.reshape(-1, 1, x.shape[-1])
    spatial = len(layer.kernel_size)
    steps: tuple[int, ...] = layer.stride
    x = x.reshape(-1, *x.shape[-spatial - 1 :])
    if isinstance(layer, _ConvTransposeNd):
        x, steps = _spread(layer, x), (1,) * spatial
    elif any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches: Tensor = x.unflatten(1, (layer.groups, -1))  # (n, groups, channels, *positions)
    for axis, (size, step, dilation) in enumerate(zip(layer.kernel_size, steps, layer.dilation, strict=True), start=3):
        patches = patches.unfold(axis, dilation * (size - 1) + 1, step)[..., ::dilation]
    return patches.permute(0, *range(3, 3 + spatial), 1, 2, *range(3 + spatial, 3 + 2 * spatial))


def _spread(layer: Any, x: Tensor) -> Any:
    """Return the input whose plain convolution, of step 1 and the flipped kernel, is the transposed one."""
    shape = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    spread: Any = x.new_zeros(*x.shape[:2], *shape)
    spread[(..., *(slice(None, None, step) for step in layer.stride))] = x
    around: list[int] = []
    for size, dilation, padding, more in zip(
        layer.kernel_size, layer.dilation, layer.padding, layer.output_padding, strict=True
    ):
        margin = dilation * (size - 1) - padding
        around = [margin, margin + more, *around]
    return functional.pad(spread, around)


def count_rows(layer: nn.Module, x: Tensor) -> int:
    """Return how many rows a call with ``x`` multiplies."""
    return int(_patches(layer, x).shape[: _dims(layer)].numel())


def rows_of(layer: nn.Module, x: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return what a layer's matrices multiply in a call, in float32: ``(groups, n, columns)``.

    Args:
        layer: a linear layer or a convolution, transposed or not.
        x: its input.
        chosen: indices of the rows that are wanted; by default all.

    Example:
        >>> layer, x = nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), torch.randn(5, 2, 7)
        >>> rows = rows_of(layer, x) @ matrix_of(layer).mT + layer.bias.detach()
        >>> torch.allclose(rows.view(5, -1, 3).mT, layer(x), atol=1e-5)
        True
    """
    patches = _patches(layer, x.detach())
    positions = patches.shape[: _dims(layer)]
    rows = patches.flatten(0, len(positions) - 1) if chosen is None else patches[torch.unravel_index(chosen, positions)]
    return rows.flatten(2).transpose(0, 1).float()


def _dims(layer: nn.Module) -> int:
    """How many dimensions of `_patches` number the rows."""
    return 1 + len(layer.kernel_size) if isinstance(layer, _ConvNd) else 1


def has_memory(x: Any) -> bool:
    """Whether something is a tensor of values that can be read: not sparse or nested, nor one within `torch.vmap`.

    Example:
        >>> has_memory(torch.ones(2)), has_memory(torch.ones(2).to_sparse())
        (True, False)
    """
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested:
        return False
    try:
        x.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a class of the user's gives a layer of torch another forward.

    Example:
        >>> has_own_forward(nn.Linear(3, 2))
        False
    """
    kinds = type(layer).__mro__
    torch_kind: Any = next(kind for kind in kinds if kind.__module__.startswith("torch.nn.modules."))
    above = kinds[: kinds.index(torch_kind)]
    # Ours, such as attention of fewer heads, computes what torch's does.
    return any("forward" in vars(kind) and not kind.__module__.startswith("lightning_compress.") for kind in above)


def is_matrix_call(layer: Any, x: Any, out: Any) -> bool:
    """Whether a call has put out what the layer's matrices make of the rows of its input, with its bias."""
    try:
        chosen = torch.arange(min(_CHECKED, count_rows(layer, x)), device=x.device)
        made = (rows_of(layer, x, chosen) @ matrix_of(layer).float().mT).transpose(0, 1).flatten(1)
        made = made if layer.bias is None else made + layer.bias.float()
        return torch.allclose(made, output_rows_of(layer, out, chosen), rtol=1e-2, atol=1e-3 * float(made.abs().max()))
    except Exception:  # its input has another shape than such a layer's
        return False


def output_rows_of(layer: nn.Module, out: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return a tensor of the shape of a layer's output as rows, in the order of `rows_of`: ``(n, channels)``.

    Example:
        >>> layer, x = nn.Conv1d(4, 6, 3, groups=2), torch.randn(5, 4, 7)
        >>> rows = rows_of(layer, x) @ matrix_of(layer).mT  # (2, 25, 3)
        >>> torch.allclose(rows.transpose(0, 1).flatten(1) + layer.bias, output_rows_of(layer, layer(x)), atol=1e-5)
        True
    """
    if isinstance(layer, _ConvNd):
        spatial = len(layer.kernel_size)
        out = out.reshape(-1, *out.shape[-spatial - 1 :]).movedim(1, -1)
    rows = out.detach().reshape(-1, out.shape[-1]).float()
    return rows if chosen is None else rows[chosen]
