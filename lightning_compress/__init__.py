"""Pruning, quantization and knowledge distillation for PyTorch Lightning."""
