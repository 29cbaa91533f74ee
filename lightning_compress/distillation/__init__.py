"""Knowledge distillation: losses, taps, adapters, the teacher, and the module that puts them together."""

from lightning_compress.distillation.adapters import adapt, make_adapter
from lightning_compress.distillation.callback import Distillation
from lightning_compress.distillation.module import DistillationModule
from lightning_compress.distillation.ramps import Ramp
from lightning_compress.distillation.student_teachers import EMATeacher, Snapshot
from lightning_compress.distillation.taps import Taps, find_layer
from lightning_compress.distillation.weights import load_weights_

__all__ = [
    "Distillation",
    "DistillationModule",
    "EMATeacher",
    "Ramp",
    "Snapshot",
    "Taps",
    "adapt",
    "find_layer",
    "load_weights_",
    "make_adapter",
]
