"""The denoising transformer."""
