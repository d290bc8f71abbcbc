"""Sequence parallelism: one sequence of tokens over several ranks."""
