"""Units are outputs: the weight of any layer is seen as ``(outputs, inputs, ...)``, and a mask of that brought back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lightning_compress.modules.layer_weights import PRUNABLE
from lightning_compress.targets import Target


@dataclass(frozen=True)
class Layout:
    """Splits a weight's dimensions, puts them in another order and merges the first ones, which number the units.

    Example:
        >>> layout = layout_of(nn.ConvTranspose2d(4, 6, 3, groups=2), "weight", torch.Size([4, 3, 3, 3]))
        >>> layout.outputs_first(torch.zeros(4, 3, 3, 3)).shape
        torch.Size([6, 2, 3, 3])
    """

    shape: torch.Size
    split: tuple[int, ...]  # the weight's shape with some dimensions split in two
    order: tuple[int, ...]  # of these dimensions, those of the outputs first
    merged: int = 1  # how many of them number the outputs

    def outputs_first(self, tensor: Tensor) -> Tensor:
        """Turn a tensor of the weight's shape into ``(outputs, inputs, ...)``."""
        ordered = tensor.reshape(self.split).permute(self.order)
        return ordered.flatten(0, self.merged - 1) if self.merged else ordered.unsqueeze(0)

    def undo(self, tensor: Tensor) -> Tensor:
        """Turn a tensor that `outputs_first` gave back into the weight's own shape."""
        ordered = tensor.reshape([self.split[dim] for dim in self.order])
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        return ordered.permute(back).reshape(self.shape)

    def alive(self, mask: Tensor) -> Tensor:
        """Tell for each output whether anything of its weights stays."""
        return self.outputs_first(mask).flatten(1).any(1)


def along(shape: torch.Size, dims: Iterable[int]) -> Layout:
    """Make the layout whose units are numbered by ``dims`` of a weight."""
    dims = tuple(dims)
    return Layout(shape, tuple(shape), (*dims, *(dim for dim in range(len(shape)) if dim not in dims)), len(dims))


def layout_of(layer: nn.Module, name: str, shape: torch.Size, outputs: bool = True) -> Layout:
    """Find the layout of a layer's weight.

    Outputs come second in transposed convolutions, group by group, and in embeddings; a recurrent unit has a row for
    each gate, unless other dimensions than ``outputs`` are asked for. In a layer of the user's own they come first, in
    a stack of three dimensions after its first.
    """
    if isinstance(layer, _ConvTransposeNd):
        groups, rest = layer.groups, tuple(shape[2:])
        split = (groups, shape[0] // groups, shape[1], *rest)
        return Layout(shape, split, (0, 2, 1, *range(3, len(split))), merged=2)
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        return along(shape, [1])
    if outputs and isinstance(layer, nn.RNNBase | nn.RNNCellBase) and _recurrent(name):
        return Layout(shape, (shape[0] // layer.hidden_size, layer.hidden_size, shape[1]), (1, 2, 0))
    if not isinstance(layer, PRUNABLE) and len(shape) == 3:
        return along(shape, [0, 1])
    return along(shape, [0])


@dataclass(frozen=True)
class UnitView:
    """Shows weights and masks as a structured method ranks them: outputs first, and a recurrent layer's unit as one.

    ``pairs`` are names of weights whose outputs are the same units, what a recurrent layer has for its inputs and its
    state; they are ranked as one under the first name.
    """

    layouts: dict[str, Layout]  # of each weight that is pruned by units
    outputs: tuple[Target, ...]  # those whose units are outputs, or may be, in a layer of the user's own
    numbered: dict[str, Layout]  # their layouts, by which these units are numbered
    pairs: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, targets: Iterable[Target], layers: Mapping[str, nn.Module], dim: int) -> UnitView:
        """Make the view of ``targets`` whose units are numbered by ``dim`` of ``(outputs, inputs, ...)``."""
        layouts, numbered, outputs = dict[str, Layout](), dict[str, Layout](), list[Target]()
        recurrent: dict[tuple[str, str], list[str]] = {}
        for target in targets:
            layer, shape = layers[target.layer], target.parameter.shape
            name = target.name.removeprefix(f"{target.layer}.")
            is_output = dim % max(len(shape), 1) == 0
            layouts[target.name] = layout_of(layer, name, shape, is_output)
            if is_output:
                outputs.append(target)
                numbered[target.name] = layouts[target.name]
                if isinstance(layer, nn.RNNBase | nn.RNNCellBase) and (found := _recurrent(name)):
                    recurrent.setdefault((target.layer, found[1]), []).append(target.name)
            elif not isinstance(layer, (*PRUNABLE, nn.Embedding, nn.EmbeddingBag)) and -len(shape) <= dim < len(shape):
                outputs.append(target)
                numbered[target.name] = along(shape, [dim % len(shape)])
        return cls(
            layouts, tuple(outputs), numbered, tuple(tuple(names) for names in recurrent.values() if len(names) > 1)
        )

    def outputs_first(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn tensors of the weights' shapes into what is ranked; nothing changes where no unit is asked for."""
        if not self.layouts:
            return dict(tensors)
        seen = {name: self.layouts[name].outputs_first(tensor) for name, tensor in tensors.items()}
        for first, *others in self.pairs:
            seen[first] = torch.cat([seen[first].flatten(1), *(seen.pop(name).flatten(1) for name in others)], dim=1)
        return seen

    def undo(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn what `outputs_first` gave back into the weights' own shapes and order."""
        parts = dict(seen)
        if not self.layouts:
            return parts
        for names in self.pairs:
            sizes = [self.layouts[name].shape.numel() // len(seen[names[0]]) for name in names]
            parts |= zip(names, seen[names[0]].split(sizes, dim=1), strict=True)
        return {name: layout.undo(parts[name]) for name, layout in self.layouts.items()}


def _recurrent(name: str) -> re.Match[str] | None:
    return re.search(r"weight_(?:ih|hh)(\w*)", name)
