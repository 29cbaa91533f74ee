"""Quantization: which numbers a layer computes with, from 8 bits down to 2, with and without training.

The callbacks stand in `qat` and `ptq`; they aren't imported here, as the room of structure needs this one first.
"""

from lightning_compress.quantization.layers.schemes import GPTQ, NF4, DynamicInt8, Packed, WeightOnly
from lightning_compress.quantization.numerics.int8 import StaticInt8
from lightning_compress.quantization.numerics.scheme import Scheme
from lightning_compress.quantization.quantize import quantize

__all__ = ["GPTQ", "NF4", "DynamicInt8", "Packed", "Scheme", "StaticInt8", "WeightOnly", "quantize"]
