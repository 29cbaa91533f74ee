"""What a visited layer is given, and what it is to put out, at some positions of its calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_compress.compensation.in_order import Visit
from lightning_compress.compensation.layer_rows import (
    columns_of,
    count_rows,
    groups_of,
    matrix_of,
    output_rows_of,
    rows_of,
)
from lightning_compress.compensation.least_squares import all_finite
from lightning_compress.compensation.pairs import Call
from lightning_compress.errors import CompressionError

_ROWS, _WIDE = 8192, 2048
"""Rows that a layer is fitted to at most; half as many where there are more columns than the second."""


def sample_rows(
    visit: Visit, calls: Sequence[Call], generator: torch.Generator, kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs ``(groups, n, columns)`` and wanted outputs ``(groups, n, rows)`` of a layer of the fitted model.

    The third says of which batch each row is: ``(n,)``.

    Wanted is what the reference puts out, plus what the stream that it is added to has lost; before a gap, what the
    stream is to be behind it. Of many rows some are taken, evenly at random.

    Args:
        visit: of the layer.
        calls: those of the visit that count.
        generator: the only source of random numbers.
        kept: which outputs of the reference's layer the fitted one has; by default all.

    Raises:
        CompressionError: something isn't finite.
    """
    layer = visit.fitted
    calls = [call for call in calls if call.tells]
    counts = [count_rows(layer, call.fitted) for call in calls]
    part = (_ROWS if columns_of(layer) <= _WIDE else _ROWS // 2) / max(1, sum(counts))
    inputs, outputs = [], []
    for call, count in zip(calls, counts, strict=True):
        chosen = None
        if part < 1:
            order = torch.randperm(count, generator=generator)[: math.ceil(count * part)]
            chosen = order.sort().values.to(call.fitted.device)
        inputs.append(rows_of(layer, call.fitted, chosen))
        outputs.append(_wanted(visit, call, chosen, kept))
    x, y = torch.cat(inputs, 1), torch.cat(outputs, 1)
    if not (all_finite(x) and all_finite(y)):
        raise CompressionError(
            f"`calibration` must be finite. Received: NaN or infinity in what `{visit.path}` is given."
        )
    sizes = torch.tensor([rows.shape[1] for rows in inputs])
    return x, y, torch.tensor([call.batch for call in calls]).repeat_interleave(sizes).to(x.device)


def _wanted(visit: Visit, call: Call, chosen: Tensor | None, kept: Tensor | None) -> Tensor:
    reference, fitted = visit.reference, visit.fitted
    wanted: Any = 0.0
    if call.reference is not None:
        rows = rows_of(reference, call.reference, chosen) @ matrix_of(reference).float().mT  # (groups, n, rows)
        wanted = rows.transpose(0, 1).flatten(1)
        if reference.bias is not None:
            wanted = wanted + reference.bias.detach().float()
        wanted = wanted if kept is None else wanted[:, kept]
    if call.terms is not None and visit.sums is not None:
        before, now = call.terms
        before = visit.sums[0].to_output(before.float(), is_difference=call.reference is not None)
        whole, own = output_rows_of(reference, before, chosen), visit.sums[1].to_output(now.float())
        wanted = wanted + (whole if kept is None else whole[:, kept]) - output_rows_of(fitted, own, chosen)
    by_group: Tensor = wanted.unflatten(1, (groups_of(fitted), -1)).transpose(0, 1)
    return by_group
