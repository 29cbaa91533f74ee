"""Numerics: numbers to codes of a few bits and back. Tensors in, tensors out; no layers, no models."""

from lightning_compress.quantization.numerics.linear import blocks, dequantize, fitted_parameters, parameters, quantize
from lightning_compress.quantization.numerics.nf4 import NF4_VALUES, nf4_codes, nf4_values
from lightning_compress.quantization.numerics.packing import pack, packed_length, unpack

__all__ = [
    "NF4_VALUES",
    "blocks",
    "dequantize",
    "fitted_parameters",
    "nf4_codes",
    "nf4_values",
    "pack",
    "packed_length",
    "parameters",
    "quantize",
    "unpack",
]
