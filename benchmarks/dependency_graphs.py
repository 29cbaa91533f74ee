"""Compares which layers can lose channels by torch-pruning's dependency graph and by our tracer.

On every network of `tests.support.zoo` and `tests.support.wide` every group of channels that a tool finds is tried on a
copy, in evaluation: every other unit is removed, the network must run, its outputs must keep their shapes and equal
those of the network with zeros in the same places. The places are read off the tensors, not asked of the tool: a second
copy, whose tensors hold the numbers of their elements, is cut in the same way. Neither tool is given hints, but
torch-pruning is told which layers make the outputs, as its users do. Where a norm spans the channels (LayerNorm,
GroupNorm), the outputs need not be the same.

Run it with `python benchmarks/dependency_graphs.py > table.md` (a minute or two).
"""

from __future__ import annotations

import copy
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are no package that is installed

from lightning_compress.channels.cutting.cut import cut_
from lightning_compress.channels.tracing.find_groups import find_groups
from lightning_compress.channels.tracing.groups import DependencyGroups
from lightning_compress.channels.tracing.verify import Subject
from lightning_compress.modules.outputs import tensors_in
from tests.support.wide import WIDE
from tests.support.zoo import ZOO, Row

MAKERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)
"""Layers that make channels: they are counted."""

TOLERANCE = 1e-4

SECONDS = 20

Cut = Callable[[nn.Module], Callable[[], object]]
"""Looks at a copy of a network, and returns what takes some channels out of it."""


@dataclass
class Found:
    """What a tool did on a network: layers that it can narrow, and layers where it tried and went wrong, with how."""

    right: set[str] = field(default_factory=set)
    wrong: dict[str, str] = field(default_factory=dict)


@contextmanager
def time_limit() -> Iterator[None]:
    """torch-pruning's search for a group doesn't end on rotary embeddings."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    }


@torch.no_grad()
def zeroed(row: Row, cut: Cut) -> nn.Module:
    """A copy with zeros where `cut` takes something out, by what it leaves of tensors that hold element numbers."""
    numbered, zeros = row.build().eval(), row.build().eval()
    apply = cut(numbered)
    for tensor in tensors(numbered).values():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    apply()
    for layer in list(zeros.modules()):  # zeros are put into the weight that is computed, whatever its norm becomes
        for name in list(getattr(layer, "parametrizations", ())):
            with torch.enable_grad():  # else it becomes no parameter
                parametrize.remove_parametrizations(layer, name)
    values = tensors(zeros)
    for name, tensor in tensors(numbered).items():
        if ".original0" in name:
            continue
        value = values[name.replace("parametrizations.", "").replace(".original1", "")]
        mask = torch.zeros(value.numel(), dtype=value.dtype)
        mask[tensor.flatten().long()] = 1
        value.mul_(mask.view(value.shape))
    return zeros


@torch.no_grad()
def fault(row: Row, model: nn.Module, cut: Cut, exact: bool) -> str:
    """What is wrong with a cut; empty if nothing is."""
    args, kwargs = row.inputs()
    shapes = [tensor.shape for tensor in tensors_in(model(*args, **kwargs))]
    narrow = copy.deepcopy(model)
    shared = {name for name, tensor in tensors(model).items() if tensor is not dict(model.named_parameters()).get(name)}
    try:
        with time_limit():
            cut(narrow)()
        if any(name in dict(narrow.named_parameters()) for name in shared):
            return "tied weights come apart"
        if all(tensor.shape == tensors(narrow)[name].shape for name, tensor in tensors(model).items()):
            return "nothing goes"
        outs = list(tensors_in(narrow(*args, **kwargs)))
    except Exception as error:
        return f"{type(error).__name__}"
    if [output.shape for output in outs] != shapes:
        return "another output shape"
    if exact:
        for output, other in zip(outs, tensors_in(zeroed(row, cut)(*args, **kwargs)), strict=True):
            scale = float(other.abs().max().clamp(min=1e-6)) if other.is_floating_point() else 1.0
            if output.is_floating_point() and not torch.allclose(output, other, rtol=0, atol=TOLERANCE * scale):
                return "another output"
    return ""


def by_tracer(row: Row, model: nn.Module) -> tuple[Found, DependencyGroups | None]:
    args, kwargs = row.inputs()
    found = Found()
    try:
        groups = find_groups(Subject(model, [lambda twin: twin(*args, **kwargs)]))
    except Exception as error:
        found.wrong["(the trace)"] = type(error).__name__
        return found, None
    for number, group in enumerate(groups.all):
        keep = [torch.ones(group.size, dtype=torch.bool) for group in groups.all]
        keep[number][::2] = False
        kept_indices, attributes = groups.kept_slices(keep), groups.numbers(keep)
        wrong = fault(row, model, lambda twin: partial(cut_, twin, kept_indices, attributes), not group.spanned)  # noqa: B023
        note(found, model, group.layers, wrong)
    return found, groups


def note(found: Found, model: nn.Module, layers: tuple[str, ...], wrong: str) -> None:
    modules = dict(model.named_modules())
    for layer in layers:
        if isinstance(modules.get(layer), MAKERS):
            if wrong:
                found.wrong[layer] = wrong
            else:
                found.right.add(layer)


def graph(row: Row, model: nn.Module) -> torch_pruning.DependencyGraph:
    args, kwargs = row.inputs()
    with torch.enable_grad():
        return torch_pruning.DependencyGraph().build_dependency(
            model,
            (args, kwargs),
            forward_fn=lambda twin, both: twin(*both[0], **both[1]),
            output_transform=lambda out: [output for output in tensors_in(out) if output.requires_grad],
            verbose=False,
        )


def by_torch_pruning(row: Row, model: nn.Module, spanned: set[str], outputs: set[str]) -> Found:
    found = Found()
    try:
        with time_limit():
            groups = list(graph(row, copy.deepcopy(model)).get_all_groups(root_module_types=list(MAKERS)))
    except Exception as error:
        found.wrong["(the graph)"] = type(error).__name__
        return found
    for group in groups:
        layers = tuple(
            dict.fromkeys(
                dep.target._name
                for dep, _ in group
                if isinstance(dep.target.module, MAKERS) and "out_channels" in dep.handler.__name__
            )
        )
        if outputs & set(layers):
            continue
        root = group[0].dep.target._name
        exact = not spanned & set(layers)
        faults = [fault(row, model, cut, exact) for cut in cuts(row, root, group)]
        if faults:
            note(found, model, layers, min(faults, key=len))
    return found


def cuts(row: Row, root: str, group: Any) -> Iterator[Cut]:
    """Every other channel; and the same of each part where some layer has its channels in parts, as its pruners do."""
    count = len(group[0].idxs)
    parts = max((getattr(dep.target.module, "groups", 1) for dep, _ in group), default=1)
    parts = max([parts, *(getattr(dep.target.module, "num_groups", 1) for dep, _ in group)])
    for pieces in dict.fromkeys((1, parts)):
        if count % pieces or count // pieces < 2:
            continue
        size = count // pieces
        indices = [place + size * piece for piece in range(pieces) for place in range(0, size, 2)]

        def cut(twin: nn.Module, indices: list[int] = indices) -> Callable[[], object]:
            layer = twin.get_submodule(root)
            dependencies = graph(row, twin)
            pruner = dependencies.get_pruner_of_module(layer)
            return dependencies.get_pruning_group(layer, pruner.prune_out_channels, indices).prune

        yield cut


def cell(found: Found, every: set[str]) -> tuple[str, str]:
    reasons: dict[str, int] = {}
    for layer, reason in found.wrong.items():
        if layer not in found.right:
            reasons[reason] = reasons.get(reason, 0) + 1
    text = ", ".join(f"{count} × {reason}" if count > 1 else reason for reason, count in reasons.items())
    return f"{len(found.right)} of {len(every)}", text


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| Network | Layers that can lose channels | torch-pruning | its faults | ours | our faults |")
    print("|:--|--:|--:|:--|--:|:--|")
    totals = [0, 0, 0]
    whole = [0, 0]
    for row in (*ZOO, *WIDE):
        model = row.build().eval()
        traced, groups = by_tracer(row, model)
        spanned = {layer for group in groups.all if group.spanned for layer in group.layers} if groups else set()
        outputs = {layer for layer, reason in groups.fixed.items() if reason == "an output"} if groups else set()
        other = by_torch_pruning(row, model, spanned, outputs)
        every = traced.right | other.right
        for place, found in enumerate((every, other.right, traced.right)):
            totals[place] += len(found)
        whole[0] += other.right == every
        whole[1] += traced.right == every
        (first, faults), (second, own) = cell(other, every), cell(traced, every)
        print(f"| {row.name} | {len(every)} | {first} | {faults} | {second} | {own} |", flush=True)
        if missing := sorted(other.right - traced.right):
            print(f"{row.name}: only torch-pruning narrows {missing}", file=sys.stderr)
    print(f"| **all {len(ZOO) + len(WIDE)}** | {totals[0]} | **{totals[1] / totals[0]:.0%}** | whole on {whole[0]} "
          f"| **{totals[2] / totals[0]:.0%}** | whole on {whole[1]} |")  # fmt: skip


if __name__ == "__main__":
    main()
