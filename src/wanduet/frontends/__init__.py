"""Doors: command line, Python."""
