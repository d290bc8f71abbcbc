"""From checkpoint files to tensors on a device."""
