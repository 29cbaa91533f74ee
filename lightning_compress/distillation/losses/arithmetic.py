"""What all losses compute with: full precision, means over what counts, and unit vectors with finite gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_compress.errors import invalid


def full(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def exact(tensor: Tensor) -> torch.autocast:
    """A context in which autocast lowers no precision, on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def mean(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of the values that count; 0 if none does.

    Example:
        >>> float(mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])))
        2.0
    """
    return values.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors of length 1 along ``dim``; a zero vector stays zero, and gets no gradient instead of an infinite one.

    Divided by their largest entry first, so that no square overflows or vanishes.

    Example:
        >>> unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    if not vectors.numel():
        return vectors
    largest = vectors.detach().abs().amax(dim, keepdim=True)
    longer = largest > torch.finfo(vectors.dtype).tiny ** 0.5
    scaled = (vectors / largest.where(longer, 1.0)).where(longer, 0.0)
    return scaled / scaled.square().sum(dim, keepdim=True).where(longer, 1.0).sqrt()


def check_shapes(student: Tensor, teacher: Tensor) -> None:
    """Raise if student and teacher can't be compared element by element."""
    if student.shape != teacher.shape:
        raise invalid(
            "teacher",
            f"give a tensor of the student's shape {tuple(student.shape)}",
            tuple(teacher.shape),
            "Both must agree on what they are compared on; override `logits` to pick or reshape what a model puts out.",
        )
