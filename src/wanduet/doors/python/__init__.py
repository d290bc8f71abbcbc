"""The call of diffusers' pipeline, on this engine."""
