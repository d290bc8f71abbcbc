"""Passes over an unchanged model."""
