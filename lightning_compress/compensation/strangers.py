"""Samples of no kind, with values that calibration doesn't hold: fits are not to ruin what it never shows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.compensation.runner import Runner
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.outputs import flatten


def strangers(runner: Runner, batches: Sequence[Any], seed: int = 0) -> list[Any]:
    """Return copies of ``batches`` in which indices that the model embeds are drawn anew, and numbers are mixed.

    An index becomes any other of its table, but where more than half of the samples have the same at this place or the
    same index anywhere (they mark beginnings, ends and gaps). Numbers become ``(x + x') / 2``, where ``x'`` has the
    values of ``x`` in another order: they lie where numbers of the calibration do.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_stranger(batch, _tables(runner, batch), generator) for batch in batches]


def _tables(runner: Runner, batch: Any) -> dict[int, int]:
    """Return the lengths of the tables that embed integer tensors of a batch, by the place among its tensors."""
    twin, found = runner.twin(), dict[int, int]()
    leaves, _ = flatten(batch)

    def see(table: nn.Embedding, args: tuple[Any, ...]) -> None:
        for place, leaf in enumerate(leaves):
            if args and isinstance(leaf, Tensor) and leaf.shape == args[0].shape and torch.equal(leaf, args[0]):
                found[place] = table.num_embeddings

    for module in twin.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(see)
    with isolated_random_state(), torch.no_grad():
        runner.run(twin, copy_tensors(batch))
    return found


def _stranger(batch: Any, tables: dict[int, int], generator: torch.Generator) -> Any:
    leaves, structure = flatten(batch)
    draw = partial(_drawn, generator=generator)
    return structure.rebuild([draw(leaf, tables.get(place)) for place, leaf in enumerate(leaves)])


def _drawn(leaf: Any, table: int | None, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor) or leaf.numel() < 2:
        return leaf
    if leaf.is_floating_point():
        values = leaf.detach().cpu().float()
        mixed = values.flatten()[torch.randperm(values.numel(), generator=generator)].view_as(values)
        return ((values + mixed) / 2).to(leaf)
    if table is None:
        return leaf
    indices = leaf.detach().cpu()
    drawn = torch.randint(table, indices.shape, generator=generator, dtype=indices.dtype)
    samples = indices.flatten(1) if indices.dim() > 1 else indices[:, None]
    common = [value for value in samples.unique() if float((samples == value).any(1).float().mean()) > 0.5]
    stays = torch.isin(indices, torch.stack(common)) if common else torch.zeros_like(indices, dtype=torch.bool)
    return torch.where(stays, indices, drawn).to(leaf.device)
