"""Visits layers in the order in which they are called, with what they are given in a reference and in a fitted model.

A visitor may change the fitted layer's weights: what is visited later sees what they put out by then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_compress.compensation.layer_rows import LINEAR, has_memory, has_own_forward, is_matrix_call
from lightning_compress.compensation.pairs import Call, Pair
from lightning_compress.compensation.repeats import calls_are_apart
from lightning_compress.compensation.runner import Runner, layers_of_
from lightning_compress.compensation.sums import Gap, Sum, Sums, find_sums
from lightning_compress.compensation.walks import small_teams
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.paths import modules_of


@dataclass(frozen=True)
class Visit:
    """A layer, or a part of one, with all calls of it.

    Attributes:
        path: its path; see `linear_parts_`.
        reference: the layer in the reference; its weights are to be read only.
        fitted: the layer in the fitted model; it shares its memory.
        calls: all calls of the layer.
        sums: what its output goes into in the reference and in the fitted model, if the other term is there before.
        gap: the gap behind its sum in the fitted model, if there is one.
    """

    path: str
    reference: Any
    fitted: Any
    calls: Sequence[Call]
    sums: tuple[Sum, Sum] | None = None
    gap: Gap | None = None


class Visits:
    """Visits some layers of two models that differ in widths and weights alone.

    Args:
        reference: what is to be computed.
        fitted: what is fitted.
        batches: run through both.
        paths: of the layers to visit.
        needs_sums: whether what outputs are added to is wanted.
        blocks: paths of blocks that pass on what they get in the fitted model.

    Attributes:
        order: these paths in the order of their first calls. What the first batch doesn't call is left out; so is a
            layer of a class whose own forward doesn't compute what its matrix does, or whose input can't be read.
        sums: of the reference and of the fitted model, where they are wanted.
    """

    def __init__(
        self,
        reference: Runner,
        fitted: Runner,
        batches: Sequence[Any],
        paths: Collection[str],
        needs_sums: bool = False,
        blocks: Collection[str] = (),
    ) -> None:
        self.runners, self.batches = (reference, fitted), batches
        self._times = self._count(paths)
        self.order = list(self._times)
        self._turns = self._count_turns()
        self.sums = [self._find_sums(runner, blocks) if needs_sums else Sums() for runner in self.runners]
        self.sums[0].gaps = self.sums[1].gaps = {
            path: gap for path, gap in self.sums[1].gaps.items() if path in self.sums[0].of and self._times[path] == 1
        }

    def _count(self, paths: Collection[str]) -> Counter[str]:
        """Count the calls of each path in the first batch."""
        times, others, runner = Counter[str](), set[str](), self.runners[1]
        twin = runner.twin()
        for path, layer in layers_of_(twin).items():
            if path in paths:
                layer.register_forward_pre_hook(partial(_count_, times, others, path), with_kwargs=True)
                if isinstance(layer, LINEAR) and has_own_forward(layer):
                    layer.register_forward_hook(partial(_check_, others, path), with_kwargs=True)
        with _quiet(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            runner.run(twin, copy_tensors(self.batches[0]))
        return Counter({path: count for path, count in times.items() if path not in others})

    def _count_turns(self) -> int:
        """Say how many walks a batch takes, of which each stops at another call of the layers that are called again.

        Where calls depend on earlier ones of the same layer, each such layer is met on a walk of its own instead.
        """
        turns, again = max(self._times.values(), default=1), sum(count > 1 for count in self._times.values())
        runner = self.runners[1]
        return turns if 1 < turns <= again and calls_are_apart(runner.twin(), runner.run, self.batches[0]) else 1

    def _find_sums(self, runner: Runner, blocks: Collection[str]) -> Sums:
        twin = runner.twin()
        layers = layers_of_(twin)
        visited = {path: layers[path] for path in self.order}
        norms = {path: layer for path, layer in visited.items() if isinstance(layer, _NormBase)}
        others = {path: layer for path, layer in visited.items() if path not in norms}
        with _quiet(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            skipped = {path: module for path, module in modules_of(twin).items() if path in blocks}
            own = copy_tensors(self.batches[0])
            return find_sums(twin, lambda model: runner.run(model, own), others, norms, skipped)

    def __iter__(self) -> Iterator[Visit]:
        left = list(self.order)
        with _quiet():
            while left:
                yield from self._walk(left)

    def _walk(self, left: list[str]) -> Iterator[Visit]:
        """Run all batches side by side, until a layer is met that is called again behind: it is visited at the end."""
        watched = set(left)
        pairs = [
            Pair(self.runners, self.sums, batch, number, watched, turn if self._turns > 1 else None)
            for number, batch in enumerate(self.batches)
            for turn in range(self._turns)
        ]
        try:
            while live := self._live(pairs):
                path = min((pair.path for pair in live), key=left.index)
                met = [pair for pair in live if pair.path == path]
                layers = met[0].layers
                calls = [pair.call() for pair in met]
                if several := self._times[path] > 1 == self._turns:
                    watched.intersection_update([path])
                    calls += self._rest(pairs)
                sums = [sums.of[path] for sums in self.sums if path in sums.of]
                gap = self.sums[1].gaps.get(path)
                yield Visit(path, *layers, calls, (sums[0], sums[1]) if len(sums) == 2 else None, gap)
                left.remove(path)
                watched.remove(path)
                if several:
                    return
            left.clear()
        finally:
            for pair in pairs:
                pair.end()

    @staticmethod
    def _live(pairs: Sequence[Pair]) -> list[Pair]:
        with small_teams(2 * len(pairs)):
            return [pair for pair in pairs if pair.go_on()]

    @staticmethod
    def _rest(pairs: Sequence[Pair]) -> list[Call]:
        """Return the further calls of the only path that is watched."""
        calls = []
        with small_teams(2 * len(pairs)):
            for pair in pairs:
                pair.is_waiting = False
                while pair.go_on():
                    calls.append(pair.call())
        return calls


def _count_(times: Counter[str], others: set[str], path: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
    times[path] += 1
    if not has_memory(args[0] if args else kwargs.get("input")):
        others.add(path)


def _check_(others: set[str], path: str, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    if not is_matrix_call(layer, args[0] if args else kwargs.get("input"), out):
        others.add(path)


@contextmanager
def _quiet() -> Iterator[None]:
    with isolated_random_state(), without_fast_path():
        yield
