"""Adapters: small trained layers that bring a student's features to the teacher's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_compress.errors import CompressionError, invalid
from lightning_compress.modules.isolation import isolated_random_state

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def make_adapter(student_shape: Sequence[int], teacher_shape: Sequence[int]) -> nn.Module | None:
    """Make the layer that brings features of ``student_shape`` to the channels of ``teacher_shape``.

    ========================  =====================================================================
    Shape                     Adapter
    ========================  =====================================================================
    (B, C)                    ``Linear``
    (B, L, D)                 ``Linear`` over D; L must agree
    (B, C, L)                 1-wide ``Conv1d``, read so where the *last* dimensions agree, the middle ones don't
    (B, C, H, W)              1x1 ``Conv2d``; :func:`adapt` pools to the teacher's resolution
    (B, C, D, H, W)           the same with ``Conv3d``
    ========================  =====================================================================

    Args:
        student_shape: Shape of the student's features, with the batch.
        teacher_shape: Shape of the teacher's features, with the batch.

    Returns:
        The layer, or None where the channels agree and there is nothing to learn.

    Raises:
        CompressionError: If no rule applies.

    Example:
        >>> make_adapter((8, 16, 4, 4), (8, 32, 2, 2))
        Conv2d(16, 32, kernel_size=(1, 1), stride=(1, 1))
        >>> make_adapter((8, 10, 64), (8, 10, 128))
        Linear(in_features=64, out_features=128, bias=True)
        >>> make_adapter((8, 5), (8, 5)) is None
        True

    References:
        Romero et al., "FitNets: Hints for Thin Deep Nets" (2015); 1x1 instead of 3x3 kernels.
    """
    student, teacher = tuple(student_shape), tuple(teacher_shape)
    if student == teacher:
        return None
    rank = len(student)
    if rank != len(teacher) or rank not in (2, 3, 4, 5) or student[0] != teacher[0]:
        raise _no_adapter(student, teacher)
    if rank >= 4:
        return None if student[1] == teacher[1] else _CONVOLUTIONS[rank](student[1], teacher[1], 1)
    if rank == 2 or student[1] == teacher[1]:
        return nn.Linear(student[-1], teacher[-1])
    if student[2] == teacher[2]:
        return nn.Conv1d(student[1], teacher[1], 1)
    raise _no_adapter(student, teacher)


def adapt(features: Tensor, teacher_shape: Sequence[int], adapter: nn.Module | None) -> Tensor:
    """Apply ``adapter``, and pool maps (rank 4 and 5) to the resolution that the teacher has in this batch.

    Args:
        features: The student's features, (B, ...).
        teacher_shape: Shape of the teacher's features in this batch.
        adapter: From :func:`make_adapter`; None changes no channels.

    Returns:
        Features of ``teacher_shape``, if the adapter was made for it.

    Example:
        >>> adapt(torch.ones(2, 3, 8, 8), (2, 5, 4, 4), nn.Conv2d(3, 5, 1)).shape
        torch.Size([2, 5, 4, 4])
    """
    size = tuple(teacher_shape[2:])
    pools = features.dim() == len(teacher_shape) and features.dim() >= 4 and tuple(features.shape[2:]) != size
    if pools and features.shape[2:].numel() >= torch.Size(size).numel():
        # The two commute; the smaller map is cheaper to convolve.
        features, pools = F.interpolate(features, size, mode="area"), False
    if adapter is not None:
        features = adapter(features)
    return F.interpolate(features, size, mode="area") if pools else features


class Adapters(nn.ModuleDict):
    """The adapters of a module by loss name; loading a state dict makes those that are missing.

    So a checkpoint loads into a module that never saw the teacher: the shape of ``weight`` says what layer to make.

    Example:
        >>> source, target = Adapters({"feature_mse": nn.Linear(4, 8)}), Adapters()
        >>> target.load_state_dict(source.state_dict())
        <All keys matched successfully>
    """

    training_only = True
    """Adapters are no part of the compressed model: they are neither pruned nor quantized."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for key, weight in state_dict.items():
            name, _, rest = key.removeprefix(prefix).partition(".")
            if key.startswith(prefix) and rest == "weight" and name not in self:
                self[name] = _from_weight(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _from_weight(weight: Tensor) -> nn.Module:
    channels_out, channels_in, *kernel = weight.shape
    with isolated_random_state():  # the initial values are overwritten at once
        kind: Any = _CONVOLUTIONS[weight.dim()] if kernel else nn.Linear
        layer: nn.Module = kind(channels_in, channels_out, *kernel[:1])
    return layer.to(weight.device, weight.dtype)


def _no_adapter(student: tuple[int, ...], teacher: tuple[int, ...]) -> CompressionError:
    return invalid(
        "student_layer",
        f"have features that an adapter can bring to the teacher's shape {teacher}",
        student,
        "Tap layers of the same rank and batch that agree in length: (B, C), (B, L, D), (B, C, L) or (B, C, H, W).",
    )
