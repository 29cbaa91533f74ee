"""Whether pruned units are silent, measured: some are zeroed on a copy, and what they become is watched while it runs.

Every operator that reaches torch's kernels is seen. Beside the outputs of a targeted weight goes a map that says which
entry is of which unit; operators that move entries move the map. Where a unit's entries meet the next weights, a sum
with something else, or the end, they must be zero. Norms shift them, and activations that aren't zero at zero; where a
parameter with an entry for each unit does it, that parameter's entries are taken out too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lightning_compress.modules.fast_path import without_fast_path
from lightning_compress.modules.paths import clean_name, compressible_modules
from lightning_compress.pruning.dependents import Observations
from lightning_compress.pruning.layout import UnitView
from lightning_compress.pruning.watch import Watch


@torch.no_grad()
def observe(model: nn.Module, run: Callable[[], Any], units: UnitView, seen: Observations) -> None:
    """Watch what half of the units of each target become when they are zero, and note it in ``seen``.

    ``run`` runs ``model``, a copy whose values change meanwhile: all away from values that are silent by chance.
    """
    tensors = {clean_name(name): tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for name, tensor in tensors.items():
            stack.callback(tensor.copy_, tensor.clone())
            if tensor.is_floating_point():
                noise = 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype) - 0.05
                noise = noise.abs() if "var" in name else noise  # a variance stays positive
                tensor.add_(noise * tensor.abs().masked_fill(tensor == 0, 1.0))
        watch = Watch(model, units, seen)
        for path, module in compressible_modules(model).items():
            for handle in watch.hooks(path, module):
                stack.enter_context(handle)
        with torch.compiler.set_stance("force_eager"), without_fast_path(), watch:
            result = run()
        watch.end(result)
