"""Unites labels of the smallest parts of a width into sets that can only go together."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED = 0
"""The label of everything that must stay."""

PARAMETER, BUFFER, MADE = range(3)

Pairs = list[tuple[Tensor, Tensor]]


class DisjointSets:
    """Numbered labels in disjoint sets; unions are collected first and resolved at once.

    Example:
        >>> sets = DisjointSets()
        >>> rows, columns = sets.new(3), sets.new(3)
        >>> sets.union(rows, columns)
        >>> sets.freeze(rows[:1], "an output")
        >>> units = sets.resolve()
        >>> units.of(rows).tolist() == units.of(columns).tolist(), units.of(columns).tolist(), units.fixed
        (True, [0, 2, 3], {1: 'an output'})
    """

    def __init__(self) -> None:
        self.count = 1
        self.in_weights = False
        """Whether what is computed now is a weight, of other weights alone."""
        self._unions: Pairs = []
        self._unions_in_weights: Pairs = []
        self._frozen: list[tuple[Tensor, str]] = []
        self._outputs: list[tuple[Tensor, str]] = []
        self._spans: list[tuple[Tensor, str]] = []
        self._lasting: list[Tensor] = []
        self._starts, self._origins = [0], [PARAMETER]

    def new(self, size: int, origin: int = PARAMETER) -> Tensor:
        """Fresh labels, int64 ``(size,)``, for a width of a `PARAMETER`, a `BUFFER`, or of what the code `MADE`."""
        self._starts.append(self.count)
        self._origins.append(origin)
        self.count += size
        return torch.arange(self.count - size, self.count)

    def origin(self, labels: Tensor) -> int:
        """Return whose width labels are of, by the first of them."""
        return self._origins[bisect_right(self._starts, int(labels.flatten()[0])) - 1]

    def union(self, left: Tensor, right: Tensor) -> None:
        """Let the labels in two tensors (which broadcast) go together."""
        if left is not right:
            left, right = (side.reshape(-1) for side in torch.broadcast_tensors(left, right))
            self._unions.append((left, right))
            if self.in_weights:
                self._unions_in_weights.append((left, right))

    def alike_in_weights(self, labels: Tensor) -> Tensor:
        """Return all labels that the computation of weights unites with these, bool ``(count,)``."""
        unit = _components(self.count, *_joined(self._unions_in_weights))
        return torch.isin(unit, unit[labels])

    def freeze(self, labels: Tensor | None, reason: str, *, output: bool = False) -> None:
        """Let labels, if there are any, stay for ever; of several reasons an ``output`` is told, else the first one."""
        if labels is not None:
            (self._outputs if output else self._frozen).append((labels.reshape(-1), reason))

    def span(self, labels: Tensor, reason: str, lasting: bool = False) -> None:
        """Note that something is computed across these labels, so that one that goes changes what the others do.

        What is ``lasting`` may go unseen on an example: a maximum, of which zeros needn't be part.
        """
        self._spans.append((labels.reshape(-1), reason))
        if lasting:
            self._lasting.append(labels.reshape(-1))

    def resolve(self) -> Units:
        """Resolve all unions: which labels can only go together, and which must stay."""
        left, right = _joined(self._unions)
        free = (left != FIXED) & (right != FIXED)
        unit = _components(self.count, left[free], right[free])
        half = (left == FIXED) ^ (right == FIXED)
        ends = torch.maximum(left, right)[half]
        fixed = dict.fromkeys(unit[ends].unique().tolist(), "it meets something of a fixed size")
        for labels, reason in reversed([*self._outputs, *self._frozen]):
            fixed.update(dict.fromkeys(unit[labels].unique().tolist(), reason))
        spanned: dict[int, str] = {}
        for labels, reason in reversed(self._spans):
            spanned.update(dict.fromkeys(unit[labels].unique().tolist(), reason))
        fixed.pop(FIXED, None)
        loose = unit.masked_fill(torch.isin(unit, torch.tensor([*fixed], dtype=torch.int64)), FIXED)
        lasting = {number for labels in self._lasting for number in unit[labels].unique().tolist()}
        return Units(unit, loose, fixed, spanned, lasting)


@dataclass(frozen=True)
class Units:
    """Sets of labels that can only go together, each such unit named by its least label.

    Attributes:
        all: ``(count,)``, the unit of each label, whether it may go or not.
        loose: the same, with `FIXED` for what must stay.
        fixed: units that must stay, with the reason.
        spanned: units that something is computed across, with what does so.
        lasting: those of them where an example needn't show it.
    """

    all: Tensor
    loose: Tensor
    fixed: dict[int, str]
    spanned: dict[int, str]
    lasting: set[int]

    def of(self, labels: Tensor) -> Tensor:
        """Return the units of some labels; `FIXED` where they must stay."""
        return self.loose[labels]


def _joined(pairs: Pairs) -> tuple[Tensor, Tensor]:
    fixed = torch.full((1,), FIXED)
    return torch.cat([fixed, *(left for left, _ in pairs)]), torch.cat([fixed, *(right for _, right in pairs)])


def _components(count: int, left: Tensor, right: Tensor) -> Tensor:
    """Return the least label of each connected component."""
    least = torch.arange(count)
    while True:
        low = torch.minimum(least[left], least[right])
        after = least.clone()
        # Unions hang on the representatives too, so that a change reaches whole components in a few rounds.
        for side in (left, right, least[left], least[right]):
            after.scatter_reduce_(0, side, low, "amin")
        after = after[after]
        if torch.equal(after, least):
            return least
        least = after
