"""Plans of zoo rows, made once for all tests, and an oracle that zeroes by itself what a plan takes out."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_compress import CompressionError, RemovalPlan, plan_removal, remove_channels_
from tests.support.oracles import differing, hooks, same_random_state, snapshot
from tests.support.wide import WIDE
from tests.support.zoo import ZOO, Row

REFUSED = {"shared", "dict"}
"""Their only hidden width is an input or an output too."""
ROWS = [row for row in ZOO if row.name not in REFUSED] + [*WIDE]
SETTINGS = ({"macs": 0.5, "seed": 0}, {"params": 0.35, "seed": 1})


def named(row: Row) -> str:
    return f"{'wide-' if row in WIDE else ''}{row}"


NAMES = [named(row) for row in ROWS]
PLANS = [(name, 0) for name in NAMES] + [(name, 1) for name in NAMES[::5]]
"""Every row is planned once, some in another way too: name and place in `SETTINGS`."""


def row_of(name: str) -> Row:
    return next(row for row in (*ROWS, *ZOO) if named(row) == name)


def inputs_of(name: str) -> Any:
    """The row's batch as `plan_removal` takes it: a tuple of arguments, or a dict of keywords where there are any."""
    row = row_of(name)
    args, kwargs = row.inputs()
    return dict(inspect.signature(row.build().forward).bind(*args, **kwargs).arguments) if kwargs else args


def run(model: nn.Module, inputs: Any, training: bool = False) -> list[Tensor]:
    """Every tensor that comes out; dropout is off."""
    model = copy.deepcopy(model).train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            module.dropout = 0.0
    with torch.no_grad(), torch.random.fork_rng():
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    leaves = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    assert leaves
    return leaves


def off(outputs: list[Tensor], references: list[Tensor]) -> float:
    """The largest difference, relative to each output's largest value."""
    assert [output.shape for output in outputs] == [reference.shape for reference in references]
    return max(
        ((output - reference).abs().max() / reference.abs().max()).item()
        for output, reference in zip(outputs, references, strict=True)
    )


@torch.no_grad()
def zeroed(model: nn.Module, plan: RemovalPlan) -> nn.Module:
    """A copy whose channels are zero where they are made and where they are read, at full size.

    A weight norm's weight is computed: there, the layer's inputs are zeroed in a hook.
    """
    twin = copy.deepcopy(model)
    names = dict(twin.named_parameters(remove_duplicate=False))
    modules = dict(twin.named_modules(remove_duplicate=False))
    for name, dims in plan.kept.items():
        path, _, leaf = name.rpartition(".")
        if "running" in leaf:
            continue
        tensor = names[name] if name in names else twin.get_buffer(name)
        for dim, kept in dims.items():
            gone = [index for index in range(tensor.shape[dim]) if index not in set(kept.tolist())]
            if ".parametrizations." not in name and not leaf.endswith(("_g", "_v")):
                tensor.index_fill_(dim, torch.tensor(gone), 0)
            elif dim == 1 and leaf in ("original1", "weight_v"):
                layer = modules[name.partition(".parametrizations.")[0] if "parametrizations" in name else path]
                layer.register_forward_pre_hook(
                    lambda layer, args, gone=gone: args[0].index_fill(
                        -1 if isinstance(layer, nn.Linear) else 1, torch.tensor(gone), 0
                    )
                )
    return twin


def cut(model: nn.Module, plan: RemovalPlan) -> nn.Module:
    twin = copy.deepcopy(model)
    remove_channels_(twin, plan)
    return twin


def inexact(model: nn.Module, plan: RemovalPlan, inputs: Any, training: bool = False) -> float:
    """How far a cut model is from the whole one with the same channels at zero."""
    assert any(row.after < row.before for row in plan.rows), "nothing went"
    return off(run(cut(model, plan), inputs, training), run(zeroed(model, plan), inputs, training))


@cache
def plan_of(name: str, setting: int) -> tuple[nn.Module, RemovalPlan, list[str]]:
    """The row's network, a plan of random channels for it, and what planning changed."""
    model = row_of(name).build()
    generator = torch.Generator().manual_seed(0)
    for number, (module, parameter) in enumerate(zip(model.modules(), model.parameters(), strict=False)):
        module.training = number % 3 > 0
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    before = snapshot(_everything(model))
    changed = []
    try:
        with same_random_state():
            plan = plan_removal(model, inputs_of(name), importance="random", **SETTINGS[setting])
    except AssertionError as error:
        changed.append(str(error))
        plan = plan_removal(model, inputs_of(name), importance="random", **SETTINGS[setting])
    changed += differing(before, snapshot(_everything(model)))
    return model, plan, changed


def _everything(model: nn.Module) -> dict[str, Any]:
    return {
        "state": model.state_dict(),
        "buffers": dict(model.named_buffers()),
        "gradients": {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
        },
        "identity": {name: id(parameter) for name, parameter in model.named_parameters()},
        "modes": {path: module.training for path, module in model.named_modules()},
        "types": {path: type(module).__name__ for path, module in model.named_modules()},
        "keys": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "hooks": hooks(model),
    }


def refusal(model: nn.Module, inputs: Any, **options: Any) -> str:
    """The text of the error with which planning ends."""
    try:
        plan = plan_removal(model, inputs, **options)
    except CompressionError as error:
        return str(error)
    raise AssertionError(f"planned: {plan}")
