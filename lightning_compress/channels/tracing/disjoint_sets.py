"""DisjointSets: the smallest parts of a width that may go, and which of them can only go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FIXED = 0
"""The atom of everything that must stay."""


class DisjointSets:
    """Numbered atoms with ties between them; ties are collected first and resolved at once.

    Example:
        >>> atoms = DisjointSets()
        >>> rows, columns = atoms.new(3), atoms.new(3)
        >>> atoms.tie(rows, columns)
        >>> atoms.pin(rows[:1], "an output")
        >>> units = atoms.resolve()
        >>> units.of(rows).tolist() == units.of(columns).tolist(), units.of(columns).tolist(), units.fixed
        (True, [0, 2, 3], {1: 'an output'})
    """

    def __init__(self) -> None:
        self.count = 1
        self.in_weights = False
        """Whether what is computed now is a weight, of other weights alone."""
        self._ties: list[tuple[Tensor, Tensor]] = []
        self._ties_in_weights: list[tuple[Tensor, Tensor]] = []
        self._pins: list[tuple[Tensor, str]] = []
        self._outputs: list[tuple[Tensor, str]] = []
        self._spans: list[tuple[Tensor, str]] = []
        self._lasting: list[Tensor] = []

    def new(self, size: int) -> Tensor:
        """Fresh atoms, int64 ``(size,)``."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def tie(self, one: Tensor, other: Tensor) -> None:
        """Let atoms of two label tensors (which broadcast) go together."""
        if one is not other:
            left, right = (side.reshape(-1) for side in torch.broadcast_tensors(one, other))
            self._ties.append((left, right))
            if self.in_weights:
                self._ties_in_weights.append((left, right))

    def alike_in_weights(self, atoms: Tensor) -> Tensor:
        """All atoms that the computation of weights ties to some, bool ``(count,)``."""
        left, right = (torch.cat([atoms[:0], *side]) for side in _columns(self._ties_in_weights))
        unit = _components(self.count, left, right)
        return torch.isin(unit, unit[atoms])

    def pin(self, atoms: Tensor, reason: str, *, output: bool = False) -> None:
        """Let atoms stay for ever; of several reasons an ``output`` is told, else the first one."""
        (self._outputs if output else self._pins).append((atoms.reshape(-1), reason))

    def span(self, atoms: Tensor, reason: str, lasting: bool = False) -> None:
        """Note that something is computed across these atoms, so that one that goes changes what the others do.

        Args:
            atoms: of the width.
            reason: what is computed.
            lasting: whether that may go unseen on an example: a maximum, of which zeros needn't be part.
        """
        self._spans.append((atoms.reshape(-1), reason))
        if lasting:
            self._lasting.append(atoms.reshape(-1))

    def resolve(self) -> Units:
        """What is tied to what."""
        left, right = (torch.cat([torch.zeros(1, dtype=torch.int64), *side]) for side in _columns(self._ties))
        loose = (left != FIXED) & (right != FIXED)
        unit = _components(self.count, left[loose], right[loose])
        half = (left == FIXED) ^ (right == FIXED)
        ends = torch.maximum(left, right)[half]
        fixed = dict.fromkeys(unit[ends].unique().tolist(), "it meets something of a fixed size")
        for atoms, reason in reversed([*self._outputs, *self._pins]):
            fixed.update(dict.fromkeys(unit[atoms].unique().tolist(), reason))
        spanned: dict[int, str] = {}
        for atoms, reason in reversed(self._spans):
            spanned.update(dict.fromkeys(unit[atoms].unique().tolist(), reason))
        fixed.pop(FIXED, None)
        loose = unit.masked_fill(torch.isin(unit, torch.tensor([*fixed], dtype=torch.int64)), FIXED)
        lasting = {one for atoms in self._lasting for one in unit[atoms].unique().tolist()}
        return Units(unit, loose, fixed, spanned, lasting)


@dataclass(frozen=True)
class Units:
    """DisjointSets that can only go together, each such set named by its least atom.

    Attributes:
        all: ``(count,)``, the unit of each atom, whether it may go or not.
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

    def of(self, atoms: Tensor) -> Tensor:
        """The units of some atoms; `FIXED` where they must stay."""
        return self.loose[atoms]


def _columns(ties: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [left for left, _ in ties], [right for _, right in ties]


def _components(count: int, left: Tensor, right: Tensor) -> Tensor:
    """The least atom of each connected component."""
    least = torch.arange(count)
    while True:
        low = torch.minimum(least[left], least[right])
        after = least.clone()
        # Ties hang on the representatives too, so that a change reaches whole components in a few rounds.
        for side in (left, right, least[left], least[right]):
            after.scatter_reduce_(0, side, low, "amin")
        after = after[after]
        if torch.equal(after, least):
            return least
        least = after
