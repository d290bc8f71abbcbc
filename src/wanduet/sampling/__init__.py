"""The denoising loop and what it steps with."""
