"""Passes that accelerate an unchanged model or reduce its memory."""
