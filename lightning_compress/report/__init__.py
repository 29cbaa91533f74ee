"""What a compression brought, measured: `measure` one model, `compare` several, `CompressionReport` in a Trainer."""

from __future__ import annotations

from lightning_compress.report.callback import CompressionReport
from lightning_compress.report.compare import Comparison, compare
from lightning_compress.report.measure import Measurement, measure, measure_in_turns

__all__ = ["Comparison", "CompressionReport", "Measurement", "compare", "measure", "measure_in_turns"]
