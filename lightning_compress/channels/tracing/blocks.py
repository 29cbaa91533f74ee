"""Finds residual blocks: modules whose output has the shape of their input, and is added to it, inside or outside.

Which tensors an output is a sum of is followed through norms, activations and views; products end it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from lightning_compress.channels.cutting.skipped import SKIPPED, Skip
from lightning_compress.channels.tracing.deterministic import deterministic
from lightning_compress.channels.tracing.groups import DependencyGroups, Group, Member
from lightning_compress.channels.tracing.tracer import leaves, name_of
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.outputs import tensors_in
from lightning_compress.modules.paths import clean_name, is_at_or_below, is_below, modules_of, named_tensors

_SUMS = {"add", "sub"}
_PASS = _SUMS | {
    *("alias", "detach", "clone", "_to_copy", "contiguous", "view", "_unsafe_view", "reshape", "permute"),
    *("transpose", "t", "unsqueeze", "squeeze", "expand", "flatten", "unflatten", "roll", "constant_pad_nd", "slice"),
    *("native_layer_norm", "native_group_norm", "native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit"),
    *("_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_fused_rms_norm", "native_dropout"),
    *("relu", "gelu", "silu", "hardtanh", "hardswish", "leaky_relu", "elu", "mish", "masked_fill"),
}
"""What leaves the terms of a sum in it, each by itself or its place."""
_SCALE = {"mul", "div"}
NONE_FOUND = "no module gives back a tensor of the shape that it takes, with that added to it inside or outside"


@dataclass
class _Call:
    """A call of a module.

    Attributes:
        x: its first tensor argument.
        argument: name and place of that.
        number: of that tensor, as it came in.
        terms: numbers of what that is a sum of.
        skip: what could take the place of the module; empty if it is no residual block.
        reason: why nothing can, if it is one.
    """

    x: Tensor
    argument: tuple[str, int]
    number: int
    terms: frozenset[int]
    skip: Skip = ()
    reason: str = ""

    def note(self, kind: str, how: Skip) -> None:
        """Note that this is a residual block."""
        if how and not self.skip:
            self.skip = [kind, *self.argument, *how]
        elif not how:
            self.reason = "a residual block that gives back more than one tensor"


class _Sums(TorchDispatchMode):
    """Follows what tensors are sums of, and which calls are terms of one.

    Attributes:
        calls: of each module, by its path.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, list[_Call]] = {}
        self._terms = WeakIdKeyDictionary()
        self._own = WeakIdKeyDictionary()
        self._count = 0
        self._awaiting: dict[int, list[tuple[_Call, Skip]]] = {}
        """Calls that gave a tensor back, by its number, and how."""
        self._open: list[tuple[str, _Call | None]] = []
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def terms(self, tensor: Tensor) -> frozenset[int]:
        if tensor not in self._terms:
            self._set(tensor, frozenset())
        return self._terms[tensor]  # type: ignore[no-any-return]

    def _set(self, tensor: Tensor, terms: frozenset[int]) -> None:
        self._count += 1
        self._own[tensor] = self._count
        self._terms[tensor] = terms | {self._count}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = leaves((args, kwargs or {}))
        name = name_of(func).rstrip("_")
        known = [self.terms(operand) for operand in operands] if name in _PASS | _SCALE else []
        out = func(*args, **(kwargs or {}))
        results = leaves(out)
        if not results or not known:
            for result in results:
                self._set(result, frozenset())
            return out
        data = [place for place, operand in enumerate(operands) if not self._is_weight(operand)]
        if name in _SCALE:
            whole = data if len(data) == 1 else []
        else:
            whole = [place for place in data if operands[place].numel() == results[0].numel() or name not in _SUMS]
        if name in _SUMS and len(whole) == 2 and operands[whole[0]].shape == operands[whole[1]].shape:
            self._meet(*(known[place] for place in whole))
        self._set(results[0], frozenset().union(*(known[place] for place in whole)))
        return out

    def _is_weight(self, tensor: Tensor) -> bool:
        return not tensor.dim() or tensor.untyped_storage().data_ptr() in self._weights

    def _meet(self, left: frozenset[int], right: frozenset[int]) -> None:
        """Note which calls are a term on one side, where what they take is made of what the other is made of."""
        for side, other in ((left, right), (right, left)):
            for number in side & self._awaiting.keys():
                for call, how in self._awaiting[number]:
                    if call.terms & other:
                        call.note("zero", how)

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [*inspect.signature(module.forward).parameters]
        named = [*zip(names, args, strict=False), *kwargs.items()]
        name, x = next(((name, value) for name, value in named if isinstance(value, Tensor)), ("", None))
        call = None
        if x is not None:
            terms = self.terms(x)
            call = _Call(x, (name, names.index(name) if name in names else -1), self._own[x], terms)
        self._open.append((path, call))

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        path, call = self._open.pop()
        if call is None:
            return
        self.calls.setdefault(path, []).append(call)
        y = next(iter(tensors_in(out)), None)
        if y is not None and y.shape == call.x.shape and y.dtype == call.x.dtype:
            how = _how(out, y)
            if how and not any(parameter.dim() > 1 for parameter in module.parameters()):
                self._terms[y] = self.terms(y) | call.terms  # a norm or an activation of any kind
            if call.number in self.terms(y):
                call.note("identity", how)
            else:
                self._awaiting.setdefault(self._own[y], []).append((call, how))
        del call.x


def _how(out: Any, y: Tensor) -> Skip:
    """Say in what container a call gives a tensor back; empty if it gives back more, or in one of another kind."""
    if out is y:
        return ["", 1, 0]
    if type(out) not in (tuple, list) or sum(item is not None for item in out) != 1:
        return []
    return [type(out).__name__, len(out), next(place for place, item in enumerate(out) if item is y)]


@contextmanager
def _watching(sums: _Sums, model: nn.Module) -> Iterator[None]:
    with ExitStack() as hooks:
        for path, module in modules_of(model).items():  # of a compiled module the one inside
            if path and not isinstance(module, torch.jit.ScriptModule):
                enter = partial(sums.enter, path)
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(sums.leave, always_call=True))
        with without_fast_path(), torch.compiler.set_stance("force_eager"), sums:
            yield


def find_blocks(subject: Subject, groups: DependencyGroups) -> DependencyGroups:
    """Return the groups with one more for each residual block, and the reasons why others stay.

    The unit of such a group is the whole block: without it, nothing of its tensors is left. Whether the model runs
    without it is to be verified by the plan.
    """
    twin = subject.twin()
    sums, modules = _Sums(twin), modules_of(twin)
    with deterministic(), _watching(sums, twin):
        subject.runs[0](twin)
    macs = {path: sum(macs for macs, _, stack in groups.costs if path in stack) for path in sums.calls}
    found = {path: calls for path, calls in sums.calls.items() if macs[path] and SKIPPED not in vars(modules[path])}
    skips = {path: calls[0].skip for path, calls in found.items() if all(call.skip == calls[0].skip for call in calls)}
    skips = {path: skip for path, skip in skips.items() if skip}
    reasons = {path: call.reason for path, calls in found.items() for call in calls if call.reason}
    blocks = [
        Group(1, 0, members, (path,), skip=skips[path])
        for path in _distinct(skips, macs)
        if (members := _members(twin, path))
    ]
    reasons = {path: why for path, why in reasons.items() if not any(is_below(block.name, path) for block in blocks)}
    if not blocks and not reasons:
        reasons = {type(twin).__name__: NONE_FOUND}
    return replace(groups, all=(*groups.all, *blocks), fixed={**groups.fixed, **reasons})


def _distinct(skips: Mapping[str, Skip], macs: Mapping[str, int]) -> list[str]:
    """Leave out blocks that cost what another around them costs, and those that are only rows of blocks."""
    found = []
    for path in skips:
        around = [other for other in skips if is_below(path, other)]
        inside = [other for other in skips if is_below(other, path) and skips[other][0] == "identity"]
        outer = [other for other in inside if not any(is_below(other, third) for third in inside)]
        row = len(outer) > 1 and sum(macs[other] for other in outer) == macs[path]
        if not row and not any(macs[other] == macs[path] for other in around):
            found.append(path)
    return found


def _members(model: nn.Module, block: str) -> tuple[Member, ...]:
    """Return the first dimension of all tensors in a block that aren't used outside of it too."""
    shared = {
        id(tensor)
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
        if not is_at_or_below(clean_name(name), block)
    }
    return tuple(
        Member(name, name.rpartition(".")[0], 0, torch.zeros(len(tensor), dtype=torch.int64), False)
        for name, tensor in named_tensors(model).items()
        if is_at_or_below(name, block) and tensor.dim() and id(tensor) not in shared
    )
