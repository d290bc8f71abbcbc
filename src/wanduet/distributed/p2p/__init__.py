"""Exchanges between GPUs that write to each other's memory (peer-to-peer)."""
