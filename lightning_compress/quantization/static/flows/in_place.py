"""int8 kernels that can't work in place: torch would say so on stderr at each call."""

from __future__ import annotations

import torch
from torch.ao.nn.quantized import LeakyReLU
from torch.fx import GraphModule


def out_of_place_(int8: GraphModule) -> None:
    """Ask no leaky ReLU of an int8 graph to work in place."""
    for module in int8.modules():
        if isinstance(module, LeakyReLU):
            module.inplace = False
    nodes = [node for node in int8.graph.nodes if node.target is torch.ops.quantized.leaky_relu]
    for node in nodes:
        node.update_kwarg("inplace", False)
    if nodes:
        int8.recompile()
