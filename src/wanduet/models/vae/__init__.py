"""The causal video VAE."""
