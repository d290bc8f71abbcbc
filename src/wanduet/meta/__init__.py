"""PyTorch's meta device: modules without memory, and the memory that code would take; and `prices`, a file."""
