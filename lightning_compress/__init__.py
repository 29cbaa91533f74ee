"""Pruning, quantization and knowledge distillation as callbacks of a PyTorch Lightning Trainer."""
