"""Code on PyTorch's meta device: modules without memory, and how much memory a run would take."""
