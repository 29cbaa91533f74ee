"""Verifies a cut on copies of a model: what is left must compute what the model computes with zeros in its place.

What can't be seen in a trace shows here: sizes that are written in the code, attributes that follow a width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.channels.cutting.cached import empty_, kinds_of
from lightning_compress.channels.cutting.cut import cut_, zero_
from lightning_compress.channels.tracing.deterministic import widen_
from lightning_compress.channels.tracing.groups import DependencyGroups, Run
from lightning_compress.channels.tracing.witness import Witness, distance, witnessed
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
        measured: a way to call it whose outputs tell what a removal costs; by default the first of the runs.
    """

    model: nn.Module
    runs: Sequence[Run]
    copy: Callable[[nn.Module], nn.Module] = copy_module
    samples: int = 1
    measured: Run | None = None

    def twin(self) -> nn.Module:
        """Return a copy of the model."""
        return self.copy(self.model)

    def cut(self, groups: DependencyGroups, keep: Sequence[Tensor]) -> nn.Module:
        """Return a copy without the units that don't stay."""
        twin = self.twin()
        cut_(twin, groups.kept_slices(keep), groups.numbers(keep))
        return twin

    def zeroed(self, groups: DependencyGroups, keep: Sequence[Tensor]) -> nn.Module:
        """Return a copy with zeros in place of the units that don't stay."""
        twin = self.twin()
        zero_(twin, groups.kept_slices(keep))
        return twin

    def failure(
        self,
        groups: DependencyGroups,
        keep: Sequence[Tensor],
        exact: bool | None = None,
        runs: int | None = None,
        hasty: bool = False,
    ) -> str:
        """Say what fails in the model without the units that don't stay; empty if nothing does.

        Where numbers differ, rounding may be all, and what near ties decide: then the cut is verified again in float64,
        with the same decisions.

        Args:
            groups: of the model.
            keep: for each group what stays, bool ``(size,)``.
            exact: whether what is computed has to be the same; by default, if nothing is computed across these units.
            runs: how many of the runs are compared; by default all.
            hasty: whether a great difference is a failure at once, where no decision can have made it.
        """
        if exact is None:
            pairs = zip(groups.all, keep, strict=True)
            exact = not any((group.spanned or group.skip) and not bool(stays.all()) for group, stays in pairs)
        verification = _Verification(self, groups, keep, exact, self.runs[:runs])
        try:
            if not (reason := verification.failure(self._tight, decided=False)) or (hasty and verification.plain):
                return reason
            if not exact:
                return verification.failure(_LOOSE)
        except Exception as error:
            return f"its code needs all of them, without some the model stops ({in_a_line(error)})"
        try:
            return verification.failure(_WIDE, wide=True)
        except Exception:  # a device without it, or code that takes no float64
            return verification.failure(_LOOSE)

    @property
    def _tight(self) -> float:
        dtypes = {parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point()}
        return min((_TIGHT.get(dtype, 0.0) for dtype in dtypes), default=_TIGHT[torch.float32])

    def shows(self, groups: DependencyGroups, keep: Sequence[Tensor]) -> bool:
        """Whether anything that comes out depends on the units that don't stay."""
        whole, zeroed = self.twin(), self.zeroed(groups, keep)
        for run in self.runs:
            outputs = zip(witnessed(run, whole).outputs, witnessed(run, zeroed).outputs, strict=True)
            if any(before.shape != after.shape or distance(before, after) > _LOOSE for before, after in outputs):
                return True
        return False

    def emptied(self) -> Subject:
        """Return the same without the tensors that its modules keep and would compute again.

        What a cut leaves of those says nothing of those that are computed afterwards.
        """
        if not (kinds := kinds_of(self.model)):
            return self
        model = self.twin()
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

    def varied(self) -> Subject:
        """Return the same with different values in tensors that are constant, if it runs so.

        Where a layer begins at zero, as heads, gates and last norms of residual branches do, what comes before it shows
        in no output.
        """
        subject = replace(self, model=self.twin())
        vary_constants_(subject.model)
        try:
            twin = subject.twin()
            outputs = [output for run in self.runs for output in witnessed(run, twin).outputs]
        except Exception:
            return self
        return self if any(bool(output.isnan().any()) for output in outputs) else subject


@dataclass
class _Verification:
    """Compares one cut with a reference: zeros in its place, or where it isn't exact the model as it is.

    A failure is ``plain`` where rounding is unlikely to have made it, and no decision can have.
    """

    subject: Subject
    groups: DependencyGroups
    keep: Sequence[Tensor]
    exact: bool
    runs: Sequence[Run]
    plain: bool = False

    def failure(self, tolerance: float, *, decided: bool = True, wide: bool = False) -> str:
        """Say what fails, if the cut takes the decisions of its reference, or its own, in float64 or not."""
        cut = self.subject.cut(self.groups, self.keep)
        own = [] if decided else [witnessed(run, cut) for run in self.runs]  # most that fail stop here
        whole = self._whole()
        if wide:
            widen_(cut)
            widen_(whole)
        told = not self.exact
        for number, run in enumerate(self.runs):
            first = witnessed(run, whole, wide=wide)
            second = witnessed(run, cut, first, wide=wide) if decided else own[number]
            undecided = not first.decides and not second.decides
            if [output.shape for output in second.outputs] != [output.shape for output in first.outputs]:
                self.plain = undecided
                return "its outputs change their shape"
            if not self.exact:
                continue
            apart, may = second.distance(first), tolerance
            self.plain = undecided and apart > _PLAIN
            if apart > may and wide:
                may = 100 * self._rounding(run, first)
            if apart > may:
                return "what remains computes something else"
            told |= may <= _TELLING
        return "" if told else "nothing can be told of it: rounding alone changes what comes out as much"

    def _whole(self) -> nn.Module:
        return self.subject.zeroed(self.groups, self.keep) if self.exact else self.subject.twin()

    def _rounding(self, run: Run, first: Witness) -> float:
        """Measure how far the last digits of the weights move the outputs."""
        nudged = self._whole()
        widen_(nudged)
        generator = torch.Generator().manual_seed(0)
        for parameter in nudged.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data *= 1 + 1e-15 * noise.to(parameter.device)
        return witnessed(run, nudged, first, wide=True).distance(first)


_WIDE, _LOOSE, _TELLING, _PLAIN = 1e-8, 1e-3, 1e-2, 0.1
_TIGHT = {torch.float64: 1e-8, torch.float32: 3e-5}
"""How far apart rounding may bring sums of a precision; a lower one tells nothing."""


@torch.no_grad()
def vary_constants_(model: nn.Module) -> None:
    """Draw the same values for tensors that are constant: weights that begin at zero, scales, biases, statistics.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = nn.init.zeros_(layer.weight)
        >>> vary_constants_(layer)
        >>> bool((layer.weight != 0).all())
        True
    """
    generator = torch.Generator().manual_seed(0)
    statistics = {id(norm.running_mean): norm for norm in model.modules() if isinstance(norm, _NormBase)}
    for tensor in (*model.parameters(), *(norm.running_mean for norm in statistics.values())):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and _is_constant(tensor):
            drawn = torch.empty(tensor.shape).uniform_(0.5, 1.5, generator=generator)
            if not tensor.any():
                drawn *= torch.randint(2, tensor.shape, generator=generator) * 2 - 1
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 1
            tensor.copy_(drawn * (-1 if tensor.any() and tensor.flatten()[0] < 0 else 1) / fan_in**0.5)


def _is_constant(tensor: Tensor) -> bool:
    return bool(tensor.numel() and tensor.isfinite().all() and (tensor == tensor.flatten()[0]).all())
