"""Traces a model's operators to find which slices of its tensors depend on each other."""
