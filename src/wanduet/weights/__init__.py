"""Finds, downloads and verifies checkpoint files, and reads their tensors."""
