"""Tries a cut on copies of a model: it must compute what the model computes with zeros in its place.

What can't be seen in a trace shows here: sizes that are written in the code, attributes that follow a width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.channels.groups import Run, Structure
from lightning_compress.channels.outputs import tensors_in
from lightning_compress.channels.remove import cut_, zero_
from lightning_compress.channels.slices import followed, kept_slices
from lightning_compress.channels.steady import steady
from lightning_compress.errors import in_a_line
from lightning_compress.quantization.calls import copy_module


@dataclass(frozen=True)
class Subject:
    """A model, and how it is called.

    Attributes:
        model: nothing of it is changed.
        runs: ways to call it; what the first one costs counts.
        copy: makes a copy that can be run.
        samples: how many samples the first run takes.
    """

    model: nn.Module
    runs: Sequence[Run]
    copy: Callable[[nn.Module], nn.Module] = copy_module
    samples: int = 1

    def cut(self, structure: Structure, keep: Sequence[Tensor]) -> nn.Module:
        """A copy without the units that don't stay."""
        twin = self.copy(self.model)
        cut_(twin, kept_slices(structure, keep), followed(structure, keep))
        return twin

    def fault(
        self, structure: Structure, keep: Sequence[Tensor], exact: bool | None = None, runs: int | None = None
    ) -> str:
        """What is wrong with the model without the units that don't stay; empty if nothing is.

        Args:
            structure: of the model.
            keep: for each group what stays, bool ``(size,)``.
            exact: whether the outputs have to be the same; by default, if nothing is computed across these units.
            runs: how many of the runs are tried; by default all.
        """
        if exact is None:
            pairs = zip(structure.groups, keep, strict=True)
            exact = not any(group.spanned and not bool(kept.all()) for group, kept in pairs)
        try:
            cut = self.cut(structure, keep)
            narrow = [_outputs(run, cut) for run in self.runs[:runs]]
            if exact:
                zeroed = self.copy(self.model)
                zero_(zeroed, kept_slices(structure, keep))
                whole = [_outputs(run, zeroed) for run in self.runs[:runs]]
            else:
                whole = self._outputs[:runs]
        except Exception as error:
            return f"its code needs all of them, without some the model stops ({in_a_line(error)})"
        for one, other in zip(narrow, whole, strict=True):
            if [leaf.shape for leaf in one] != [leaf.shape for leaf in other]:
                return "its outputs change their shape"
            if exact and not all(map(_close, one, other)):
                return "what remains computes something else"
        return ""

    @cached_property
    def _outputs(self) -> list[list[Tensor]]:
        """Of the model as it is."""
        twin = self.copy(self.model)
        return [_outputs(run, twin) for run in self.runs]


def samples_in(inputs: Any) -> int:
    """How many samples a batch holds: the length of dimension 0 of its first tensor that has one.

    Example:
        >>> samples_in({"scale": torch.tensor(2.0), "x": torch.ones(4, 3)}), samples_in("text")
        (4, 1)
    """
    found = (leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim())
    return max(1, next(found, 1))


def _outputs(run: Run, model: nn.Module) -> list[Tensor]:
    with steady():
        return [leaf if leaf.layout == torch.strided else leaf.to_dense() for leaf in tensors_in(run(model))]


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.numel():
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return bool((one == other).float().mean() >= 0.99)  # near ties may fall otherwise
    eps = torch.finfo(one.dtype).eps
    one, other = (torch.view_as_real(x) if x.is_complex() else x.double() for x in (one, other))
    finite = one.isfinite()
    if not torch.equal(finite, other.isfinite()):
        return False
    one, other = one[finite], other[finite]
    scale = other.abs().max().clamp(min=1e-6) if len(other) else 1.0
    return bool(((one - other).abs() <= max(1e-3, 10 * eps) * scale).all())
