"""Follows every channel through a run of a model: which slices of which parameters are the same channel.

Each dimension of a parameter gets labels of its own. Every operator that reaches torch's kernels then says what becomes
of them: a sum unites the labels of its terms, a product those of the dimension that it contracts, a view moves them.
What an operator isn't known to leave independent stays (`DisjointSets.freeze`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from lightning_compress.channels.tracing.disjoint_sets import BUFFER, MADE, PARAMETER, DisjointSets
from lightning_compress.channels.tracing.notes import Factors, Size, Written

Rule = Callable[["Tracer", Any, Any, dict[str, Any], Any], None]
"""Says what an operator does with labels: (tracer, operator, its args and kwargs, what came out)."""

Operand = tuple[tuple[int, ...], Sequence[Tensor]]
"""A tensor's shape, and its factors."""

_FACTORIES = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided",
              "new_empty_strided", "rand", "randn"}  # fmt: skip


def spread(labels: Tensor | None, dim: int, rank: int) -> Factors:
    """Return labels ``(size,)`` along one dimension as the factor of a tensor of this rank; none of None."""
    shape = [1] * rank
    shape[dim] = -1
    return () if labels is None else (labels.reshape(shape),)


def first_along(factor: Tensor, dim: int) -> Tensor:
    """Return the labels along one dimension, at the first place of all others."""
    return factor.movedim(dim, 0).reshape(factor.shape[dim], -1)[:, 0]


def leaves(tree: Any) -> list[Tensor]:
    """Return the tensors among an operator's arguments, or of what came out."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def name_of(func: Any) -> str:
    """Return an operator's name without its namespace."""
    return str(func._schema.name.rpartition("::")[2])


def given(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of an operator's call by name."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def varying(factor: Tensor) -> tuple[int, ...]:
    """Return the dimensions along which a factor varies."""
    return tuple(dim for dim, size in enumerate(factor.shape) if size > 1)


def compressed(factor: Tensor) -> Tensor:
    """Return a factor without the dimensions along which it is constant."""
    for dim in varying(factor):
        first = factor.narrow(dim, 0, 1)
        if not factor.stride(dim) or bool((factor == first).all()):
            factor = first
    return factor


def clusters(factors: list[Tensor]) -> list[set[int]]:
    """Return sets of dimensions that factors share, each once."""
    clusters: list[set[int]] = []
    for dims in map(set, map(varying, factors)):
        for cluster in [cluster for cluster in clusters if cluster & dims]:
            clusters.remove(cluster)
            dims |= cluster
        clusters += [dims] if dims else []
    return clusters


class Tracer(TorchDispatchMode):
    """Follows channels through everything that runs under it.

    Args:
        tensors: parameters and buffers by name; their dimensions get labels.
        numbers: path of a module to the whole numbers among its attributes: a view that one of them shapes splits a
            width into that many blocks, such as heads.
        rule_for: gives the rule of each operator.
        choices: how often a split is to be taken otherwise than by the first guess, by the split's key.

    Attributes:
        sets: all labels, and which of them go together.
        labels_of: name of each tensor that was seen to its labels.
        counting: whether what runs now costs something.
        strangers: how many modules that aren't the model's are running: what they cost doesn't count.
        products: multiply-accumulates, the labels of widths that they are proportional to, and the modules that run.
        macs: what all of it costs, also where no channel has a say.
        sizes: sizes that were written into views.
        outer: widths that weights make, in products with what isn't made of weights alone.
        written: calls that may name such sizes.
        splits: key of each view that split a width, and of each guess like it, with the labels of that width.
        parts: labels of a width to the parts that were taken of it, by their places.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        numbers: Mapping[str, set[int]],
        rule_for: Callable[[Any], Rule],
        choices: Mapping[str, int],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sets = DisjointSets()
        self.numbers = numbers
        self.choices = choices
        self.labels_of: dict[str, Factors] = {}
        self.products: list[tuple[int, Factors, tuple[str, ...]]] = []
        self.counting = True
        self.strangers = 0
        self.macs = 0
        self.sizes: list[Size] = []
        self.outer: list[Tensor] = []
        self.written: list[Written] = []
        self.is_writing = False
        self.splits: dict[str, list[Tensor]] = {}
        self.parts: dict[tuple[int, ...], dict[tuple[int, ...], Tensor]] = {}
        self.stack: list[str] = [""]
        self._rule_for = rule_for
        self._names = {id(tensor): name for name, tensor in tensors.items()}
        self._labels = WeakIdKeyDictionary()
        self._of_weights, self._of_code = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    @property
    def path(self) -> str:
        """The module that runs."""
        return self.stack[-1]

    def labels(self, tensor: Tensor) -> Factors:
        """Return the labels of a tensor; new ones for a parameter that is seen for the first time."""
        if tensor not in self._labels:
            name = self._names.get(id(tensor))
            self._labels[tensor] = () if name is None else self._fresh(name, tensor)
        return self._labels[tensor]  # type: ignore[no-any-return]

    def _fresh(self, name: str, tensor: Tensor) -> Factors:
        origin = PARAMETER if isinstance(tensor, nn.Parameter) else BUFFER
        widths = [(dim, self.sets.new(size, origin)) for dim, size in enumerate(tensor.shape) if size > 1]
        self.labels_of[name] = tuple(factor for dim, labels in widths for factor in spread(labels, dim, tensor.dim()))
        return self.labels_of[name]

    def name(self, name: str, tensor: Tensor) -> None:
        """Note what is known of a tensor that was computed and is kept, if its widths lie along one dimension each."""
        known: Factors = self._labels.get(tensor, ())
        if known and name not in self.labels_of and all(len(varying(factor)) == 1 for factor in known):
            self.labels_of[name] = known

    def set(self, tensors: Any, factors: Factors) -> None:
        """Set the labels of new tensors."""
        for tensor in leaves(tensors):
            own = tuple(map(compressed, factors))
            for factor in own:
                if not varying(factor):  # all of it hangs on one channel, which some index chose
                    self.sets.freeze(factor, f"an index of its own, in {self.where()}")
            self._labels[tensor] = tuple(filter(varying, own))

    def where(self) -> str:
        """The module that runs, as an error names it."""
        return f"`{self.path}`" if self.path else "the model's forward"

    def made(self, tensor: Tensor, dims: Iterable[int]) -> Factors:
        """Label what code made as long as some width, such as a mask for every head: it goes with what it meets."""
        factors: Factors = ()
        for dim in dims:
            if (size := tensor.shape[dim]) > 1:
                labels = self.sets.new(size, MADE)
                self.note_size(size, labels)
                factors += spread(labels, dim, tensor.dim())
        return factors

    def note_written(
        self,
        shape: Iterable[int],
        factors: Factors,
        view: tuple[Tensor, Factors] | None = None,
        ends: Iterable[int] = (),
    ) -> None:
        """Note a call whose sizes the code may have written: see `Written`."""
        if self.is_writing:
            made = None if view is None else (tuple(view[0].shape), view[1])
            self.written.append(Written(self.path, tuple(shape), factors, made, tuple(ends)))

    def note_size(self, size: int, labels: Tensor) -> None:
        """Note a size that the module which runs may have written, with the labels that it counts."""
        self.sizes.append(Size(self.path, size, labels))

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or a buffer, or computed from such alone."""
        return id(tensor) in self._names or tensor in self._of_weights

    def is_made(self, tensor: Tensor) -> bool:
        """Whether a tensor was made by the code, of numbers alone."""
        return tensor in self._of_code

    def costs(self, macs: int, *widths: Tensor | None) -> None:
        """Note what an operator costs, and the widths that it is proportional to."""
        if self.counting and not self.strangers:
            self.macs += macs
            known = tuple(labels for labels in widths if labels is not None)
            self.products.append((macs, known, tuple(self.stack)))

    def freeze(self, tensors: Any, reason: str, *, output: bool = False) -> None:
        """Let every channel of some tensors stay; that they are an ``output`` is told before any other reason."""
        for leaf in leaves(tensors):
            for factor in self.labels(leaf):
                self.sets.freeze(factor, reason, output=output)

    def along(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the labels along one dimension, ``(size,)``, or None if there are none.

        Where other dimensions have a say too, what differs in them is united.
        """
        dim %= tensor.dim()
        factors = [factor for factor in self.labels(tensor) if factor.shape[dim] > 1]
        if len(factors) > 1:
            for factor in factors:
                self.sets.freeze(factor, f"two widths in one dimension, in {self.where()}")
        if len(factors) != 1:
            return None
        [factor] = factors
        moved = factor.movedim(dim, 0).reshape(factor.shape[dim], -1)
        self.sets.union(moved, moved[:, :1])
        return moved[:, 0]

    def same(self, *widths: tuple[Tensor, int]) -> Tensor | None:
        """Unite dimensions (tensor, dim) of one size that meet in an operator; returns their labels."""
        found = [(tensor, dim, self.along(tensor, dim)) for tensor, dim in widths]
        known = [labels for _, _, labels in found if labels is not None]
        for labels in known[1:]:
            self.sets.union(labels, known[0])
        if known and len(known) < len(found) and known[0].numel() > 1:
            self.sets.freeze(known[0], f"it meets a tensor of fixed size in {self.where()}")
        return known[0] if known else None

    def operand(self, tensor: Tensor, rank: int) -> Operand:
        """Return a tensor with ones before its shape, as it broadcasts to this rank."""
        ones = (1,) * (rank - tensor.dim())
        return (*ones, *tensor.shape), [factor.reshape((*ones, *factor.shape)) for factor in self.labels(tensor)]

    def meet(self, operands: Sequence[Operand]) -> Factors:
        """Unite the factors of operands that broadcast; returns those of the outcome."""
        factors = []
        for dims in clusters([factor for _, factors_of in operands for factor in factors_of]):
            labels, fixed = list[Tensor](), False
            for shape, factors_of in operands:
                if all(shape[dim] == 1 for dim in dims):
                    continue  # broadcast along all of it
                own = [factor for factor in factors_of if set(varying(factor)) & dims]
                labels += own
                # One without labels has a size that can't change; two widths at once can't be told apart.
                fixed |= len(own) != 1
            first, *others = labels
            for other in others:
                self.sets.union(first, other)
            if fixed:
                for factor in labels:
                    self.sets.freeze(factor, f"it meets a tensor of fixed size in {self.where()}")
            size = [max(factor.shape[dim] for factor in labels) for dim in range(first.dim())]
            factors.append(first.expand(size))
        return tuple(factors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        tensors = leaves((args, kwargs))
        weights = list(map(self.is_weight, tensors))
        alone = all(weight or self.is_made(tensor) for weight, tensor in zip(weights, tensors, strict=True))
        self.sets.in_weights = alone and any(weights)
        if alone:
            known = self._of_weights if any(weights) else self._of_code
            known.update(dict.fromkeys(leaves(out)))
        if func.namespace == "aten" and name_of(func) in _FACTORIES:
            self.set(out, self.made(out, range(out.dim())))
        elif any(self.labels(tensor) for tensor in tensors):
            with _disable_current_modes():  # what is done to labels is nobody's concern
                self._rule_for(func)(self, func, args, kwargs, out)
        elif func is torch.ops.aten.expand.default:
            dims = [dim for dim in range(1, out.dim()) if not out.stride(dim)]  # the first is the batch
            self.set(out, self.made(out, dims))
        elif self.counting and func._overloadpacket in flop_registry:
            self.costs(int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)) // 2)
        return out


def unknown(tracer: Tracer, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
    """Freeze whatever an unknown operator gets."""
    tracer.freeze((args, kwargs), f"`{name_of(func)}` in {tracer.where()} isn't understood")
    tracer.set(out, ())
