"""Frames to files, and what made them."""
