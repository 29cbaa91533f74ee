"""Tries a cut on copies of a model: it must compute what the model computes with zeros in its place.

What can't be seen in a trace shows here: sizes that are written in the code, attributes that follow a width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.channels.cutting.cached import empty_, kinds_of
from lightning_compress.channels.cutting.cut import cut_, zero_
from lightning_compress.channels.cutting.slices import followed, kept_slices
from lightning_compress.channels.tracing.deterministic import deterministic, widen_
from lightning_compress.channels.tracing.groups import DependencyGroups, Run
from lightning_compress.channels.tracing.lively import enliven_
from lightning_compress.channels.tracing.outputs import tensors_in
from lightning_compress.channels.tracing.witness import Witness, distance
from lightning_compress.errors import in_a_line
from lightning_compress.modules.copying import copy_module


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

    def cut(self, structure: DependencyGroups, keep: Sequence[Tensor]) -> nn.Module:
        """A copy without the units that don't stay."""
        twin = self.copy(self.model)
        cut_(twin, kept_slices(structure, keep), followed(structure, keep))
        return twin

    def fault(
        self, structure: DependencyGroups, keep: Sequence[Tensor], exact: bool | None = None, runs: int | None = None
    ) -> str:
        """What is wrong with the model without the units that don't stay; empty if nothing is.

        Where numbers differ, rounding may be all, and what near ties decide: then it is tried again in float64, with
        the same decisions.

        Args:
            structure: of the model.
            keep: for each group what stays, bool ``(size,)``.
            exact: whether what is computed has to be the same; by default, if nothing is computed across these units.
            runs: how many of the runs are tried; by default all.
        """
        if exact is None:
            pairs = zip(structure.groups, keep, strict=True)
            exact = not any(group.spanned and not bool(kept.all()) for group, kept in pairs)
        trial = _Trial(self, structure, keep, exact, self.runs[:runs])
        try:
            if not (reason := trial.fault(self._tight, decided=False)) or not exact:
                return reason and trial.fault(_LOOSE)
        except Exception as error:
            return f"its code needs all of them, without some the model stops ({in_a_line(error)})"
        try:
            return trial.fault(_WIDE, wide=True)
        except Exception:  # a device without it, or code that takes no float64
            return trial.fault(_LOOSE)

    def zeroed(self, structure: DependencyGroups, keep: Sequence[Tensor]) -> nn.Module:
        """A copy with zeros in place of the units that don't stay."""
        twin = self.copy(self.model)
        zero_(twin, kept_slices(structure, keep))
        return twin

    @property
    def _tight(self) -> float:
        kinds = {one.dtype for one in self.model.parameters() if one.is_floating_point()}
        return min((_TIGHT.get(kind, 0.0) for kind in kinds), default=_TIGHT[torch.float32])

    def shows(self, structure: DependencyGroups, keep: Sequence[Tensor]) -> bool:
        """Whether anything that comes out depends on the units that don't stay."""
        whole, zeroed = self.copy(self.model), self.zeroed(structure, keep)
        for run in self.runs:
            outputs = zip(witnessed(run, whole).outputs, witnessed(run, zeroed).outputs, strict=True)
            if any(one.shape != other.shape or distance(one, other) > _LOOSE for one, other in outputs):
                return True
        return False

    def emptied(self) -> Subject:
        """The same without the tensors that its modules keep and would compute again.

        What a cut leaves of those says nothing of those that are computed afterwards.
        """
        if not (kinds := kinds_of(self.model)):
            return self
        model = self.copy(self.model)
        for kind in sorted(kinds, key=str):  # the same on all ranks
            for delete in (False, True):
                tried = self.copy(model)
                empty_(tried, kind, delete=delete)
                if self._fills(tried, kind):
                    empty_(model, kind, delete=delete)
                    break
        return replace(self, model=model)

    def _fills(self, model: nn.Module, kind: tuple[type[nn.Module], str]) -> bool:
        filled = False
        try:
            for run in self.runs:
                witnessed(run, model)
                filled |= kind in kinds_of(model)
        except Exception:
            return False
        return filled

    def enlivened(self) -> Subject:
        """The same with values of their own in tensors that are constant, if it runs so.

        Where a layer begins at zero, as heads, gates and last norms of residual branches do, what comes before it shows
        in no output.
        """
        model = self.copy(self.model)
        enliven_(model)
        subject = replace(self, model=model)
        try:
            twin = subject.copy(model)
            outputs = [output for run in self.runs for output in witnessed(run, twin).outputs]
        except Exception:
            return self
        return self if any(bool(one.isnan().any()) for one in outputs) else subject


@dataclass(frozen=True)
class _Trial:
    """One cut, and what it is held against: zeros in its place, or where it isn't exact the model as it is."""

    subject: Subject
    structure: DependencyGroups
    keep: Sequence[Tensor]
    exact: bool
    runs: Sequence[Run]

    def fault(self, tolerance: float, *, decided: bool = True, wide: bool = False) -> str:
        """What is wrong, if the cut takes the decisions of what it is held against, or its own, in float64 or not."""
        cut = self.subject.cut(self.structure, self.keep)
        own = [] if decided else [witnessed(run, cut) for run in self.runs]  # most that fail stop here
        whole = self._whole()
        if wide:
            widen_(cut)
            widen_(whole)
        told = not self.exact
        for number, run in enumerate(self.runs):
            first = witnessed(run, whole, wide=wide)
            second = witnessed(run, cut, first, wide=wide) if decided else own[number]
            if [one.shape for one in second.outputs] != [one.shape for one in first.outputs]:
                return "its outputs change their shape"
            if not self.exact:
                continue
            apart, may = second.distance(first), tolerance
            if apart > may and wide:
                may = 100 * self._rounding(run, first)
            if apart > may:
                return "what remains computes something else"
            told |= may <= _TELLING
        return "" if told else "nothing can be told of it: rounding alone changes what comes out as much"

    def _whole(self) -> nn.Module:
        return self.subject.zeroed(self.structure, self.keep) if self.exact else self.subject.copy(self.subject.model)

    def _rounding(self, run: Run, first: Witness) -> float:
        """What the network makes of the last digits of its weights."""
        nudged = self._whole()
        widen_(nudged)
        generator = torch.Generator().manual_seed(0)
        for one in nudged.parameters():
            one.data *= 1 + 1e-15 * torch.randn(one.shape, generator=generator, dtype=torch.float64).to(one.device)
        return witnessed(run, nudged, first, wide=True).distance(first)


_WIDE, _LOOSE, _TELLING = 1e-8, 1e-3, 1e-2
_TIGHT = {torch.float64: 1e-8, torch.float32: 3e-5}
"""How far apart rounding may bring sums of a precision; a lower one tells nothing."""


def witnessed(run: Run, model: nn.Module, first: Witness | None = None, *, wide: bool = False) -> Witness:
    """What a run of a model computes, if it takes the decisions of another one."""
    witness = Witness(first)
    with deterministic(wide=wide), witness.watching(model):
        outputs = list(tensors_in(run(model)))
    witness.outputs = [leaf if leaf.layout == torch.strided else leaf.to_dense() for leaf in outputs]
    return witness


def samples_in(inputs: Any) -> int:
    """How many samples a batch holds: the length of dimension 0 of its first tensor that has one.

    Example:
        >>> samples_in({"scale": torch.tensor(2.0), "x": torch.ones(4, 3)}), samples_in("text")
        (4, 1)
    """
    found = (leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim())
    return max(1, next(found, 1))
