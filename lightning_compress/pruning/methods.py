"""Pruning rules: a name or an import path becomes a rule that decides which elements or units go next.

All rules run through `torch.nn.utils.prune.BasePruningMethod.compute_mask`, so that a user's subclass is a rule like
any other.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from lightning_compress.errors import CompressionError, invalid, nearest

NAMED: dict[str, type[prune.BasePruningMethod]] = {
    "random_unstructured": prune.RandomUnstructured,
    "l1_unstructured": prune.L1Unstructured,
    "random_structured": prune.RandomStructured,
    "ln_structured": prune.LnStructured,
    "custom_from_mask": prune.CustomFromMask,
}


@dataclass(frozen=True)
class Rule:
    """A pruning rule with its settings.

    Attributes:
        name: as the user wrote it.
        cls: the torch rule that computes the masks.
        dim: for structured rules, the dimension whose slices are the units.
        norm: for ``ln_structured``, the order of the norm.
    """

    name: str
    cls: type[prune.BasePruningMethod]
    dim: int = 0
    norm: float = 2.0

    @property
    def structured(self) -> bool:
        return bool(self.cls.PRUNING_TYPE == "structured")  # type: ignore[attr-defined]

    @property
    def fixes_sparsity(self) -> bool:
        """Whether the rule itself decides how much goes, as masks from a file do."""
        return "amount" not in inspect.signature(self.cls.__init__).parameters

    def mask(self, tensor: Tensor, mask: Tensor, amount: int) -> Tensor:
        """``mask`` with ``amount`` more elements (or units along ``dim``) of ``tensor`` taken out.

        Args:
            tensor: the weights, any shape.
            mask: bool, same shape; False is pruned and stays so.
            amount: how many, of those that ``mask`` still keeps; ignored by a rule that fixes its own sparsity.
        """
        given = {"amount": amount, "dim": self.dim, "n": self.norm}
        accepted = inspect.signature(self.cls.__init__).parameters
        method = self.cls(**{name: value for name, value in given.items() if name in accepted})
        # The container hands the rule only what is still kept, so nothing is pruned twice.
        container = prune.PruningContainer()
        container._tensor_name = method._tensor_name = "weight"
        container.add_pruning_method(method)
        grown: Tensor = container.compute_mask(tensor, mask.to(tensor.dtype))
        return grown.bool() & mask

    def unit_scores(self, tensor: Tensor) -> Tensor:
        """One score for each unit along ``dim``, comparable between layers: the norm over the unit's size."""
        units = tensor.movedim(self.dim, 0).flatten(1)
        if self.cls is prune.RandomStructured:
            return torch.rand(len(units), device=tensor.device)
        norms: Tensor = torch.linalg.vector_norm(units.float(), ord=self.norm, dim=1)
        size = units.shape[1]
        return norms / (size ** (1 / self.norm) if self.norm else size)


def resolve(method: str, dim: int = 0, norm: float = 2.0) -> Rule:
    """The rule of a name in `NAMED`, or of the import path of a `BasePruningMethod` subclass.

    Raises:
        CompressionError: no such name, nothing at that path, or it isn't a `BasePruningMethod`.

    Example:
        >>> resolve("ln_structured", dim=0, norm=1.0).structured
        True
    """
    if method in NAMED:
        return Rule(method, NAMED[method], dim, norm)
    if "." not in method:
        raise invalid("method", "be a pruning rule or the import path of one", method, nearest(method, NAMED))
    module, _, name = method.rpartition(".")
    try:
        cls: Any = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise invalid("method", "be a pruning rule or the import path of one", method, f"{error}.") from error
    if not (isinstance(cls, type) and issubclass(cls, prune.BasePruningMethod)):
        raise invalid("method", "name a subclass of torch.nn.utils.prune.BasePruningMethod", method)
    if getattr(cls, "PRUNING_TYPE", None) not in ("unstructured", "structured", "global"):
        raise CompressionError(
            f"`method` must set PRUNING_TYPE to 'unstructured', 'structured' or 'global'. Received: {method}."
        )
    return Rule(method, cls, dim, norm)
