"""Decides before weights are loaded which device runs each model, and with which settings."""
