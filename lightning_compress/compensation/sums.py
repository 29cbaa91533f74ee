"""Which sums do the outputs of layers go into? A layer that is added to a stream can make up for the stream, too."""

from __future__ import annotations

import types
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

Back = Callable[[Tensor, bool], Tensor]
"""Undoes a step on a difference of two outputs, or on an output itself if the flag says so."""

_ADDS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_SAME = {"dropout", "dropout1d", "dropout2d", "dropout3d", "clone", "contiguous", "float", "to"}
_SCALES = {"mul", "mul_", "__mul__", "__rmul__", "__imul__"}


class FunctionLog(TorchFunctionMode):
    """Numbers the tensors that the functions of a run put out, and holds those that are wanted.

    The same code puts out the same tensor under the same number, whatever the widths of its layers are.
    """

    def __init__(self, wanted: Container[int] = ()) -> None:
        super().__init__()
        self.count = 0
        self.wanted = wanted
        self.held: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.count += 1
            if self.count in self.wanted:
                self.held[self.count] = out
            self.see(func, args, kwargs or {}, out)
        return out

    def see(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        """Look at a call of a function."""


@dataclass(frozen=True)
class Sum:
    """Says what a layer's output is added to.

    Attributes:
        total: number of the sum; see `FunctionLog`.
        back: brings a term of the sum back to the layer's output, last step first.
        others: the layer's call, counted from 0, to the number of the other term, which is there before.
    """

    total: int
    back: tuple[Back, ...]
    others: dict[int, int] = field(default_factory=dict)

    def to_output(self, term: Tensor, is_difference: bool = True) -> Tensor:
        """Return the output of the layer that makes this term of the sum, or this difference of two."""
        for step in self.back:
            term = step(term, is_difference)
        return term


@dataclass(frozen=True)
class Gap:
    """Says that a sum, possibly normed, goes into a block that passes it on: what the block made of it is to be in it.

    Attributes:
        block: the block's path; the last one's, where several follow each other.
        before: ``before(wanted, total)`` gives the sum of which what stands between makes ``wanted``; ``total`` is the
            sum in the reference, for what isn't determined.
    """

    block: str
    before: Callable[[Tensor, Tensor], Tensor]


@dataclass
class Sums:
    """What `find_sums` found.

    Attributes:
        of: path of a layer to the sum that its output goes into.
        normed: path of a norm to the layer whose output it norms.
        gaps: path of a layer to the gap behind its sum.
    """

    of: dict[str, Sum] = field(default_factory=dict)
    normed: dict[str, str] = field(default_factory=dict)
    gaps: dict[str, Gap] = field(default_factory=dict)


def find_sums(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    layers: Mapping[str, nn.Module],
    norms: Mapping[str, nn.Module],
    blocks: Mapping[str, nn.Module] = types.MappingProxyType({}),
) -> Sums:
    """Run a model once, and find the sums that outputs of ``layers`` go into, each by itself.

    On its way an output may be normed by a BatchNorm, scaled by a parameter or number, and permuted. Behind a sum, on
    its way to one of the ``blocks`` that pass on what they get, may stand a LayerNorm or a ReLU.
    """
    finder = _Finder()
    with ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(finder.enter, path)).remove)
            hooks.callback(layer.register_forward_hook(partial(finder.leave, path)).remove)
        for path, norm in norms.items():
            hooks.callback(norm.register_forward_pre_hook(partial(finder.norm, path)).remove)
        for path, block in blocks.items():
            hooks.callback(block.register_forward_hook(partial(finder.pass_on, path)).remove)
        with finder:
            run(model)
    return finder.sums


class _Way(NamedTuple):
    """How a tensor came of a layer's output: its path, which call of it, the count at its begin, and the way back."""

    path: str
    call: int
    entered: int
    back: tuple[Back, ...] = ()


class _Finder(FunctionLog):
    def __init__(self) -> None:
        super().__init__()
        self.sums = Sums()
        self._entered = dict[str, list[int]]()
        self._numbers, self._ways = WeakTensorKeyDictionary(), WeakTensorKeyDictionary()
        self._totals = WeakTensorKeyDictionary()

    def enter(self, path: str, *_: Any) -> None:
        self._entered.setdefault(path, []).append(self.count)

    def leave(self, path: str, layer: nn.Module, args: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            self._ways[out] = _Way(path, len(self._entered[path]) - 1, self._entered[path][-1])

    def norm(self, path: str, norm: nn.Module, args: Any) -> None:
        way = self._ways.get(args[0]) if args and isinstance(args[0], Tensor) else None
        if way is not None and not way.back:
            self.sums.normed[path] = way.path

    def pass_on(self, path: str, block: nn.Module, args: Any, out: Any) -> None:
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and (found := self._totals.get(tensor)) is not None:
                layer, before = found
                self.sums.gaps[layer] = Gap(path, before)

    def see(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        name = getattr(func, "__name__", "")
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        if name in _ADDS and len(tensors) == 2 and tensors[0].shape == tensors[1].shape == out.shape:
            self._totals.pop(out, None)  # changed in place
            for term, other in (tensors, tensors[::-1]):
                self._add(term, other, out)
            self._ways.pop(out, None)
        elif tensors and (found := self._totals.get(tensors[0])) is not None:
            before = _before(name, args, kwargs)
            if before is not None and found[1] is _same:
                self._totals[out] = (found[0], before)
            elif out is tensors[0]:  # changed in place
                del self._totals[out]
        elif (source := next((tensor for tensor in tensors if self._ways.get(tensor) is not None), None)) is not None:
            way, step = self._ways[source], _step_back(name, args, kwargs, source)
            if step is not None:
                self._ways[out] = way._replace(back=(step, *way.back))
            elif out is source:  # changed in place
                del self._ways[out]
        self._numbers[out] = self.count

    def _add(self, term: Tensor, other: Tensor, out: Tensor) -> None:
        way, number = self._ways.get(term), self._numbers.get(other)
        if way is None or number is None or number > way.entered:
            return
        if way.path not in self.sums.of:
            self._totals[out] = (way.path, _same)
        self.sums.of.setdefault(way.path, Sum(self.count, way.back)).others.setdefault(way.call, number)


def _same(wanted: Tensor, total: Tensor) -> Tensor:
    return wanted


def _before(name: str, args: Any, kwargs: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return what gives the input by which a function makes what is wanted; None for a function that isn't known."""
    if name in _SAME:
        return _same
    if name in ("relu", "relu_"):
        return lambda wanted, total: torch.where(wanted > 0, wanted, total.clamp_max(0))
    if name == "layer_norm":
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        weight, bias = given.get("weight"), given.get("bias")
        dims = [-1 - number for number in range(len(given["normalized_shape"]))]
        return partial(_unnormed, weight=weight, bias=bias, dims=dims)
    return None


def _unnormed(wanted: Tensor, total: Tensor, weight: Tensor | None, bias: Tensor | None, dims: list[int]) -> Tensor:
    """Bring back what a LayerNorm wanted to make; the mean and the size of its input, which it forgets, stay."""
    wanted = wanted if bias is None else wanted - bias.detach()
    wanted = wanted if weight is None else _divided(wanted, weight.detach())
    variance, mean = torch.var_mean(total, dims, keepdim=True, correction=0)
    return mean + variance.sqrt() * wanted


def _step_back(name: str, args: Any, kwargs: Any, source: Tensor) -> Back | None:
    """Return what undoes a function on a difference of ``source``; None for a function that isn't known."""
    if name in _SCALES and len(args) == 2:
        scale = args[1] if args[0] is source else args[0]
        known = isinstance(scale, nn.Parameter | int | float)
        return partial(_rescaled, scale=torch.as_tensor(scale).detach()) if known else None
    if args[0] is not source:
        return None
    if name in _SAME:
        return lambda term, is_difference: term
    if name == "batch_norm":
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("training") or given["running_var"] is None:
            return None
        return partial(_unscaled, norm=given)
    if name == "permute":
        order = args[1:] if isinstance(args[1], int) else args[1]
        return lambda term, is_difference: term.permute(*torch.tensor(order).argsort().tolist())
    if name in ("transpose", "swapaxes"):
        return lambda term, is_difference: term.transpose(args[1], args[2])
    return None


def _unscaled(term: Tensor, is_difference: bool, norm: Mapping[str, Any]) -> Tensor:
    """Bring back what a BatchNorm in evaluation has made: ``y = (x - mean) s + bias``."""
    along = (-1, *[1] * (term.dim() - 2))
    weight, bias = (None if norm.get(name) is None else norm[name].detach().view(along) for name in ("weight", "bias"))
    scale = (norm["running_var"] + norm.get("eps", 1e-5)).rsqrt().view(along)
    scale = scale if weight is None else scale * weight
    if is_difference:
        return _divided(term, scale)
    mean: Tensor = norm["running_mean"].view(along)
    return _divided(term if bias is None else term - bias, scale) + mean


def _rescaled(term: Tensor, is_difference: bool, scale: Tensor) -> Tensor:
    return _divided(term, scale)


def _divided(term: Tensor, scale: Tensor) -> Tensor:
    """Divide; what a scale next to zero silences has nothing to make up for."""
    tiny = scale.abs() <= 1e-3 * scale.abs().max()
    return term / torch.where(tiny, torch.inf, scale)
