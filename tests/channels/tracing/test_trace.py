"""Which channels hang together: against torch-pruning's graph, and in networks that people have."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torch_pruning as tp
from torch import nn

from lightning_compress import RemovalPlan, plan_removal
from tests.channels.cuts import inexact, inputs_of, plan_of
from tests.channels.idioms import IDIOMS, Idiom

CNNS = [
    *("conv_bn_relu", "residual", "concat", "depthwise", "wide-vgg", "wide-resnet", "wide-bottleneck"),
    *("wide-mobilenet_v2", "wide-mobilenet_v3", "wide-densenet", "wide-unet", "wide-inception", "wide-two_outputs"),
]


@pytest.mark.parametrize("name", CNNS)
def test_groups_are_those_of_torch_pruning(name: str) -> None:
    model, plan, _ = plan_of(name, 0)
    inputs = inputs_of(name)
    modules = dict(model.named_modules())
    paths = {module: path for path, module in modules.items()}
    graph = tp.DependencyGraph().build_dependency(model, inputs)
    expected: dict[tuple[str, int], set[int]] = defaultdict(set)
    for layer in {layer for row in plan.rows for layer in row.layers}:
        weight = modules[layer].weight
        made = int(isinstance(modules[layer], nn.ConvTranspose2d))
        gone = _gone(plan, f"{layer}.weight", made, weight.shape[made])
        prune = tp.prune_linear_out_channels if weight.dim() == 2 else tp.prune_conv_out_channels
        for dependency, indices in graph.get_pruning_group(modules[layer], prune, idxs=gone) if gone else ():
            module = dependency.target.module
            if module in paths and getattr(module, "weight", None) is not None:
                reads = graph.is_in_channel_pruning_fn(dependency.handler) and module.weight.dim() > 1
                reads = reads and getattr(module, "groups", 1) == 1  # both prune the rows of a depthwise one
                dim = int(reads != isinstance(module, nn.ConvTranspose2d))
                expected[f"{paths[module]}.weight", dim].update(indices)
    found = {
        (name, dim): set(_gone(plan, name, dim, model.get_parameter(name).shape[dim]))
        for name, dims in plan.kept.items()
        if name.endswith("weight")
        for dim in dims
    }
    assert len(found) >= 3
    assert found == expected


def _gone(plan: RemovalPlan, name: str, dim: int, size: int) -> list[int]:
    stays = plan.kept.get(name, {}).get(dim, torch.arange(size)).tolist()
    return [index for index in range(size) if index not in stays]


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom[0])
def test_idioms_are_understood(idiom: Idiom) -> None:
    _, net, shapes, shrinks = idiom
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model, inputs = net(), tuple(torch.randn(shape) for shape in shapes)
    plan = plan_removal(model, inputs, macs=0.45, importance="random")
    assert inexact(model, plan, inputs) < 1e-5
    assert {name for name in plan.kept if "bias" not in name and "running" not in name} == set(shrinks.split())
