"""How do a model's outputs depend on something inside of it? A random product of them has the gradients that tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_compress.modules.outputs import flatten


class WithGradients(TorchFunctionMode):
    """Keeps gradients where a step switches them off, as validation steps may."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is torch._C._set_grad_enabled else func(*args, **(kwargs or {}))


def random_loss(calls: Sequence[tuple[nn.Module, Any]], generator: torch.Generator) -> Tensor | None:
    """Return ``sum <y, v> / std(y)`` over outputs y, with v drawn from a normal distribution; None without gradients.

    The mean of its squared derivative along any change, over v, is the squared change of the outputs, to first order,
    over their variance.

    Args:
        calls: what was called from outside, with its outputs; see `outer_outputs`.
        generator: the only source of random numbers.
    """
    terms = []
    for output in outputs_with_gradients(calls):
        drawn = torch.randn(output.shape, generator=generator).to(output)
        terms.append((output * drawn).sum() / output.detach().std().clamp_min(1e-12))
    return sum(terms[1:], terms[0]) if terms else None


def outputs_with_gradients(calls: Sequence[tuple[nn.Module, Any]]) -> list[Tensor]:
    """Return the outputs that depend on something with gradients; scalars, such as losses, aren't among them."""
    leaves = (leaf for _, output in calls for leaf in flatten(output)[0])
    return [
        leaf
        for leaf in leaves
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad and leaf.numel() > 1
    ]
