"""Layers that are quantized one by one: dynamic int8, and weights alone."""
