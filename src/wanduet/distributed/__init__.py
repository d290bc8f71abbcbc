"""Process groups, sequence parallelism and CFG parallelism, and copies between GPUs."""
