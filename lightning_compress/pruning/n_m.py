"""N:M sparsity: of every M consecutive weights along a layer's input dimension at most N stay."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_compress.errors import invalid

_CHUNK = 1 << 16
"""Groups that are looked at together: few enough to stay in a CPU's cache."""


@dataclass(frozen=True)
class Pattern:
    """Describes N:M sparsity: ``n`` of every ``m`` weights stay, so the fraction ``1 - n / m`` is zero."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read the pattern of ``"2:4"``.

        Raises:
            CompressionError: it isn't two whole numbers with 0 < N < M.

        Example:
            >>> Pattern.parse("2:4")
            Pattern(n=2, m=4)
        """
        left, _, right = str(text).partition(":")
        if not (left.isdecimal() and right.isdecimal() and 0 < int(left) < int(right)):
            raise invalid("n_m", "be 'N:M' with 0 < N < M", text, 'Of every M weights N stay: "2:4" zeroes half.')
        return cls(int(left), int(right))

    def smallest(self, scores: Tensor, mask: Tensor, dim: int, signed: bool = False) -> Tensor:
        """Mark the ``m - n`` smallest magnitudes of every group; what ``mask`` has pruned goes first.

        Groups are consecutive entries along ``dim``, whose size is a multiple of ``m``. With ``signed`` the values
        themselves are ranked, the most negative first.

        Example:
            >>> weight = torch.tensor([[3.0, -1.0, 2.0, 0.5]])
            >>> Pattern(2, 4).smallest(weight, torch.ones(1, 4, dtype=torch.bool), 1)
            tensor([[False,  True, False,  True]])
        """
        moved = scores.detach().movedim(dim, -1)
        groups = moved.reshape(-1, self.m)
        alive = mask.movedim(dim, -1).reshape(-1, self.m)
        goes = torch.empty_like(alive)
        for start in range(0, len(groups), _CHUNK):
            part = slice(start, start + _CHUNK)
            ranked = groups[part] if signed else groups[part].abs()
            # Above what is pruned already, and NaN above all.
            ranked = ranked.nan_to_num(torch.inf, torch.inf, torch.finfo(ranked.dtype).min)
            ranked = torch.where(alive[part], ranked, -torch.inf)
            torch.lt(_ranks(ranked), self.m - self.n, out=goes[part])
        return goes.view(moved.shape).movedim(-1, dim)


def _ranks(groups: Tensor) -> Tensor:
    """Rank every entry within its row; of equal entries the first ranks lower.

    Rows are short: comparing all pairs, column by column, is two to three times faster than sorting them.
    """
    columns = groups.t().contiguous()
    counts = torch.uint8 if len(columns) <= 256 else torch.int32
    ranks = torch.zeros(columns.shape, dtype=counts, device=groups.device)
    for later in range(1, len(columns)):
        for earlier in range(later):
            first = (columns[earlier] <= columns[later]).view(torch.uint8)
            ranks[later] += first
            ranks[earlier] += 1 - first
    return ranks.t()
