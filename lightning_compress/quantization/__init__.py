"""Quantization: which numbers a layer computes with, int8 with and without training."""

from lightning_compress.quantization.ptq import PostTrainingQuantization
from lightning_compress.quantization.qat import QuantizationAwareTraining
from lightning_compress.quantization.quantize import quantize
from lightning_compress.quantization.schemes import DynamicInt8, Scheme, StaticInt8

__all__ = ["DynamicInt8", "PostTrainingQuantization", "QuantizationAwareTraining", "Scheme", "StaticInt8", "quantize"]
