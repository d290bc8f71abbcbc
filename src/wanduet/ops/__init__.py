"""Kernels, each with its plain PyTorch form beside it."""
