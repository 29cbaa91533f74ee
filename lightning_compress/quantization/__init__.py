"""Quantization: which numbers a layer computes with, int8 with and without training.

The callbacks stand in `qat` and `ptq`; they aren't imported here, as the room of structure needs this one first.
"""

from lightning_compress.quantization.quantize import quantize
from lightning_compress.quantization.schemes import DynamicInt8, Scheme, StaticInt8, WeightOnly

__all__ = ["DynamicInt8", "Scheme", "StaticInt8", "WeightOnly", "quantize"]
