"""Walks of a batch through two models side by side, from layer to layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress.compensation.runner import Runner, layers_of_
from lightning_compress.compensation.sums import FunctionLog, Gap, Sums
from lightning_compress.compensation.walks import Walk
from lightning_compress.modules.copying import copy_tensors
from lightning_compress.modules.isolation import isolated_random_state
from lightning_compress.modules.paths import modules_of


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


class Pair:
    """The walks of a batch through the reference and the fitted model, which stop before the same layer.

    Args:
        runners: the reference and the fitted model.
        sums: of both.
        batch: that runs.
        number: of the batch.
        watched: paths of the layers before which they stop; it may lose some on the way.
        turn: the only call of each layer before which they stop, counted from 0; by default at all.
    """

    def __init__(
        self,
        runners: Sequence[Runner],
        sums: Sequence[Sums],
        batch: Any,
        number: int,
        watched: Collection[str],
        turn: int | None = None,
    ) -> None:
        self.is_waiting, self._number = False, number
        walks = [partial(_walk_of, *each, batch, watched, turn) for each in zip(runners, sums, strict=True)]
        with isolated_random_state(seed=number):  # what a model draws is the same in both, and not in all batches
            self._walks = [walks[0](sums[0].gaps), walks[1]({})]
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


def _walk_of(
    runner: Runner, sums: Sums, batch: Any, watched: Collection[str], turn: int | None, gaps: Mapping[str, Gap]
) -> Walk:
    """Make a walk that stops before each watched layer, and for one with a gap behind the block that is left out."""
    numbers = {number for entry in sums.of.values() for number in entry.others.values()}
    log = FunctionLog(numbers | {sums.of[path].total for path in gaps})
    calls = Counter[str]()

    def enter(path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        number = sums.of[path].others.get(calls[path]) if path in sums.of else None
        term = None if number is None else log.held.pop(number, None)
        calls[path] += 1
        if path in watched and path not in gaps and turn in (None, calls[path] - 1):
            given = args[0] if args else kwargs["input"]
            walk.stop(_Place(path, layer, given, None if term is None else lambda: term))

    def leave(path: str, layer: nn.Module, block: nn.Module, args: Any, out: Any) -> None:
        total = log.held.pop(sums.of[path].total, None)
        wanted = next((leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)), None)
        if path in watched and not turn:  # it is called once
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
