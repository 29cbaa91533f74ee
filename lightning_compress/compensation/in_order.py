"""Visits layers in the order in which they are called, with what they are given in a reference and in a fitted model.

A visitor may change the fitted layer's weights: what is visited later sees what they put out by then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils import _pytree as pytree

from lightning_compress.compensation.layer_rows import LINEAR, has_own_forward, is_matrix_call
from lightning_compress.compensation.parts import linear_parts_
from lightning_compress.compensation.sums import FunctionLog, Gap, Sum, Sums, find_sums
from lightning_compress.compensation.walks import Walk, small_teams
from lightning_compress.modules.calls import run_step
from lightning_compress.modules.copying import copy_module, copy_tensors
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.paths import modules_of

Run = Callable[[nn.Module, Any], Any]
Copy = Callable[[nn.Module, Mapping[int, Any]], nn.Module]


@dataclass(frozen=True)
class Runner:
    """A model, and how a batch runs through a copy of it.

    Attributes:
        model: whose parameters and statistics its copies share.
        run: runs a batch through a copy.
        copy: makes a copy that has some tensors of the model, by their `id`.
    """

    model: nn.Module
    run: Run = run_step
    copy: Copy = copy_module

    def twin(self) -> nn.Module:
        """Return a copy in evaluation mode, with the model's own parameters and statistics of norms."""
        norms = [module for module in self.model.modules() if isinstance(module, _NormBase)]
        statistics = [buffer for norm in norms for buffer in norm.buffers()]
        twin = self.copy(self.model, {id(tensor): tensor for tensor in (*self.model.parameters(), *statistics)})
        return twin.eval()


@dataclass(frozen=True)
class Call:
    """What a layer is given in one call, in the reference and in the fitted model, and what its output is added to.

    ``batch`` is the number of the batch that runs. Before a gap there is no input in the reference: the first of the
    ``terms`` is the sum that is wanted there.
    """

    batch: int
    reference: Tensor | None
    fitted: Tensor
    terms: tuple[Tensor, Tensor] | None = None

    @property
    def tells(self) -> bool:
        """Whether it is known what the layer is to put out."""
        return self.reference is not None or self.terms is not None


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
        order: these paths in the order of their first calls. What the first batch doesn't call is left out, and so is a
            layer of a class whose own forward doesn't compute what its matrix does.
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
                layer.register_forward_pre_hook(partial(_count_, times, path))
                if isinstance(layer, LINEAR) and has_own_forward(layer):
                    layer.register_forward_hook(partial(_check_, others, path), with_kwargs=True)
        with _quiet(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            runner.run(twin, copy_tensors(self.batches[0]))
        return Counter({path: count for path, count in times.items() if path not in others})

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
        """Run all batches side by side, until a layer is met that is called several times: it is visited at the end."""
        watched = set(left)
        pairs = [_Pair(self, number, watched) for number in range(len(self.batches))]
        try:
            while live := self._live(pairs):
                path = min((pair.path for pair in live), key=left.index)
                met = [pair for pair in live if pair.path == path]
                layers = met[0].layers
                calls = [pair.call() for pair in met]
                if several := self._times[path] > 1:
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
    def _live(pairs: Sequence[_Pair]) -> list[_Pair]:
        with small_teams(2 * len(pairs)):
            return [pair for pair in pairs if pair.go_on()]

    @staticmethod
    def _rest(pairs: Sequence[_Pair]) -> list[Call]:
        """Return the further calls of the only path that is watched."""
        calls = []
        with small_teams(2 * len(pairs)):
            for pair in pairs:
                pair.is_waiting = False
                while pair.go_on():
                    calls.append(pair.call())
        return calls


class _Pair:
    """The walks of a batch through the reference and the fitted model, which stop before the same layer."""

    def __init__(self, visits: Visits, number: int, watched: set[str]) -> None:
        self.is_waiting, self._number = False, number
        pairs = zip(visits.runners, visits.sums, strict=True)
        walks = [partial(_walk_of, runner, sums, visits.batches[number], watched) for runner, sums in pairs]
        with isolated_random_state(seed=number):  # what a model draws is the same in both, and not in all batches
            self._walks = [walks[0](visits.sums[0].gaps), walks[1]({})]
        self._places: list[_Place] = []

    def go_on(self) -> bool:
        """Run until the next stop, if a visit doesn't wait for this pair; tell whether there is one."""
        if not self.is_waiting:
            places = [walk.go_on() for walk in self._walks]
            # Two that take different ways have nothing more to tell.
            self.is_waiting = None not in places and places[0].path == places[1].path
            self._places = places if self.is_waiting else []
        return self.is_waiting

    @property
    def path(self) -> str:
        return self._places[0].path

    @property
    def layers(self) -> tuple[nn.Module, nn.Module]:
        reference, fitted = self._places
        return reference.layer, fitted.layer

    def call(self) -> Call:
        """Take what the layer is given; the pair goes on afterwards."""
        reference, fitted = self._places
        self.is_waiting = False
        terms = None if reference.term is None or fitted.term is None else (reference.term(), fitted.term())
        return Call(self._number, reference.given, fitted.given, terms)

    def end(self) -> None:
        for walk in self._walks:
            walk.end()


class _Place(NamedTuple):
    path: str
    layer: nn.Module
    given: Any
    term: Callable[[], Tensor] | None
    """Gives the other term of a sum; called outside of the run, whose functions are counted."""


def _walk_of(runner: Runner, sums: Sums, batch: Any, watched: set[str], gaps: Mapping[str, Gap]) -> Walk:
    """Make a walk that stops before each watched layer, and for one with a gap behind the block that is left out."""
    numbers = {entry.other for entry in sums.of.values()} | {sums.of[path].total for path in gaps}
    log = FunctionLog(numbers)

    def enter(path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        term = log.held.pop(sums.of[path].other, None) if path in sums.of else None
        if path in watched and path not in gaps:
            given = args[0] if args else kwargs["input"]
            walk.stop(_Place(path, layer, given, None if term is None else lambda: term))

    def leave(path: str, layer: nn.Module, block: nn.Module, args: Any, out: Any) -> None:
        total = log.held.pop(sums.of[path].total, None)
        wanted = next((leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)), None)
        if path in watched:
            known = isinstance(total, Tensor) and isinstance(wanted, Tensor) and total.shape == wanted.shape
            before: Any = gaps[path].before
            walk.stop(_Place(path, layer, None, partial(before, wanted, total) if known else None))

    def run(walk: Walk) -> None:
        twin = runner.twin()
        layers, modules = layers_of_(twin), modules_of(twin)
        for path, layer in layers.items():
            layer.register_forward_pre_hook(partial(enter, path), with_kwargs=True)
        for path, gap in gaps.items():
            modules[gap.block].register_forward_hook(partial(leave, path, layers[path]))
        own = copy_tensors(batch)  # whose functions aren't the run's
        with log if sums.of else nullcontext():
            runner.run(twin, own)

    walk = Walk(run)
    return walk


def _count_(times: Counter[str], path: str, *_: Any) -> None:
    times[path] += 1


def _check_(others: set[str], path: str, layer: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
    if not is_matrix_call(layer, args[0] if args else kwargs.get("input"), out):
        others.add(path)


@contextmanager
def _quiet() -> Iterator[None]:
    with isolated_random_state(), without_fast_path():
        yield


def layers_of_(model: nn.Module) -> dict[str, nn.Module]:
    """Let layers compute in parts; return what can be visited: all that is a matrix, and norms that keep statistics."""
    norms = {path: layer for path, layer in modules_of(model).items() if isinstance(layer, _NormBase)}
    return {**linear_parts_(model), **{path: norm for path, norm in norms.items() if norm.running_var is not None}}
