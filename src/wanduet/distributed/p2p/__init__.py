"""Exchanges between GPUs that write to each other's memory."""
