"""Whole units, traced and quantized with fixed ranges."""
