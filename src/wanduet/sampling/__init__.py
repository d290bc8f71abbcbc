"""The denoising loop, guidance, samplers, noise and checkpoints."""
