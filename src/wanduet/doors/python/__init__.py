"""diffusers' pipeline call, run by this engine."""
