"""Measures what residual blocks are worth: how much a model's outputs change without them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_compress.channels.cutting.skipped import set_skipped_
from lightning_compress.channels.tracing.deterministic import deterministic
from lightning_compress.channels.tracing.groups import DependencyGroups
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.modules.outputs import tensors_in
from lightning_compress.modules.paths import modules_of


class Changes:
    """Measures how much the outputs of a model change by a removal: the sum of the squared differences."""

    def __init__(self, subject: Subject, groups: DependencyGroups) -> None:
        self._subject, self._groups = subject, groups
        self._twin = subject.twin()
        self._modules = modules_of(self._twin)
        self._before = self._outputs(self._twin)
        self._measured: dict[frozenset[int], float] = {}

    def without(self, blocks: Sequence[int]) -> float:
        """Return the change without some blocks, by their groups' numbers; infinite where the model fails then."""
        if frozenset(blocks) in self._measured:
            return self._measured[frozenset(blocks)]
        gone = {self._groups.all[number].name: self._groups.all[number].skip for number in blocks}
        for path, skip in gone.items():
            set_skipped_(self._modules[path], skip)
        try:
            change = self._measured[frozenset(blocks)] = self._change(self._twin)
        finally:
            for path in gone:
                set_skipped_(self._modules[path], None)
        return change

    def by(self, keep: Sequence[Tensor]) -> float:
        """Return the change of a removal as planned, by what stays of each group."""
        return self._change(self._subject.cut(self._groups, keep))

    def _outputs(self, model: torch.nn.Module) -> list[Tensor]:
        with deterministic():
            return list(tensors_in((self._subject.measured or self._subject.runs[0])(model)))

    def _change(self, model: torch.nn.Module) -> float:
        try:
            after = self._outputs(model)
        except Exception:  # its code needs what is gone
            return math.inf
        if [output.shape for output in after] != [output.shape for output in self._before]:
            return math.inf
        pairs = [(old, new) for old, new in zip(self._before, after, strict=True) if old.is_floating_point()]
        total = sum(float((new.double() - old.double()).square().sum()) for old, new in pairs)
        return total if math.isfinite(total) else math.inf


def cheapest_first(
    changes: Changes, blocks: Sequence[int], cost: Callable[[Sequence[int]], float], least: float
) -> list[int]:
    """Order blocks by how they are best removed, as long as the cost without them is ``least`` or more.

    The next one changes the outputs least by cost that leaves, beside those that have left.
    It is measured again only while it may be the next, as a block that stays matters more and more.
    """
    gone: list[int] = []
    now, change = cost(gone), 0.0
    measured = dict.fromkeys(blocks, (-math.inf, 0.0, -1))  # change by cost, change, beside how many others
    while measured:
        number = min(measured, key=lambda number: measured[number][0])
        worth, without, beside = measured[number]
        left = cost([*gone, number])
        if left < least or left >= now or worth == math.inf:
            del measured[number]
        elif beside == len(gone):
            gone, now, change = [*gone, number], left, without
            del measured[number]
        else:
            without = changes.without([*gone, number])
            measured[number] = (without - change) / (now - left), without, len(gone)
    return gone


def best_count(most: int, loss: Callable[[int], tuple[float, float]]) -> int:
    """Return the number up to ``most`` with the least loss, of a few, evenly spaced, and ever closer to the best one.

    Example:
        >>> best_count(20, lambda count: (abs(count - 7), 0.0))
        7
    """
    step, tried = max(1, most // _TRIALS), dict[int, tuple[float, float]]()

    def known(count: int) -> tuple[float, float]:
        if count not in tried:
            tried[count] = loss(count)
        return tried[count]

    best = min(range(0, most + 1, step), key=known)
    while step > 1:
        step = (step + 1) // 2
        best = min((best, *(count for count in (best - step, best + step) if 0 <= count <= most)), key=known)
    return best


_TRIALS = 4
