"""What an approximation costs: its video against the exact one of the same prompt and seed, measured on this machine."""
