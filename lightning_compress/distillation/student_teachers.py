"""Teachers that are made of the student in a fit: a snapshot, and a moving average of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.channels.cutting.cut import cut_
from lightning_compress.distillation.taps import drop_taps_
from lightning_compress.errors import invalid, is_number
from lightning_compress.modules.copying import copy_module
from lightning_compress.modules.resizing import Cut
from lightning_compress.structure.change import match_, recorded


class Snapshot(nn.Module):
    """A frozen copy of the student as it is when a fit begins: before the fit prunes, narrows or quantizes it.

    Layers are named as in the student. A fit that resumes takes its copy before the checkpoint is loaded, from a
    student that was built and initialised as for the first fit; a warning says if the copy isn't the same.

    Example:
        >>> from lightning_compress import DistillationModule, SoftTarget
        >>> module = DistillationModule(nn.Linear(4, 3), teacher=Snapshot(), losses=[SoftTarget()])
        >>> module.prepare_()
        >>> torch.equal(module.teacher.model.weight, module.student.weight)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module | None = None

    def take_(self, student: nn.Module) -> None:
        """Copy the student, frozen and without taps."""
        model = copy_module(student)
        drop_taps_(model)
        self.model = model.requires_grad_(False).eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.model is None:
            raise invalid("teacher", "have been taken from a student", type(self).__name__, "`fit` does so.")
        return self.model(*args, **kwargs)


class EMATeacher(Snapshot):
    """A mean teacher: the exponential moving average of the student's weights, after each optimizer step.

    ``θ' ← decay · θ' + (1 - decay) · θ`` for parameters; buffers (BatchNorm's statistics) are the student's own. It
    begins as a copy of the student. A whole checkpoint holds it beside the model's weights, as nothing else could bring
    it back.

    Args:
        decay: In [0, 1); 0.999 remembers about the last thousand steps.

    Raises:
        CompressionError: If the decay is out of range.

    Example:
        >>> student, teacher = nn.Linear(1, 1, bias=False), EMATeacher(decay=0.75)
        >>> teacher.take_(student.requires_grad_(False))
        >>> before = student.weight.clone()
        >>> student.weight += 4.0
        >>> teacher.follow_(student)
        >>> torch.allclose(teacher.model.weight, before + 1.0)
        True

    References:
        Tarvainen and Valpola, "Mean teachers are better role models" (2017), eq. 2.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not (is_number(decay) and 0 <= decay < 1):
            raise invalid("decay", "lie in [0, 1)", decay, "Usual values: 0.99 to 0.9999.")
        self.decay = decay
        self._exact: dict[str, Tensor] = {}

    def take_(self, student: nn.Module) -> None:
        super().take_(student)
        self._exact = {}

    @torch.no_grad()
    def follow_(self, student: nn.Module) -> None:
        """Move towards the student's weights; the student may be prepared for int8 meanwhile."""
        if self.model is None:
            return
        parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
        for name, average in self.model.named_parameters():
            if not average.is_floating_point():
                continue
            if average.element_size() > 2:
                self._exact[name] = average.data
            # In 16 bits a thousandth of a step would be rounded away.
            exact = self._exact.setdefault(name, average.float())
            exact.lerp_(parameters[name].to(exact.device, exact.dtype), 1 - self.decay)
            average.copy_(exact)
        for name, buffer in self.model.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])

    def on_channels_removed(self, cut: Cut) -> None:
        """Lose the channels that the student lost."""
        if self.model is not None:
            cut_(self.model, cut.kept_indices, cut.attributes)
            self._exact = {name: cut.of(name, exact) for name, exact in self._exact.items()}

    def take_structure_(self, student: nn.Module) -> None:
        """Take the structure of the student, which may have lost channels since it was built."""
        if self.model is not None:
            match_(self.model, {change.key: record for change, record in recorded(student) if change.is_float})

    def average(self) -> dict[str, Any]:
        """Return the average in full precision, for a checkpoint."""
        return {} if self.model is None else {**self.model.state_dict(), **self._exact}

    def restore_(self, average: dict[str, Any]) -> None:
        """Go on from an average that :meth:`average` returned."""
        if self.model is not None:
            self.model.load_state_dict(average)
            parameters = dict(self.model.named_parameters())
            self._exact = {name: average[name].float().clone() for name in parameters if name in average}
