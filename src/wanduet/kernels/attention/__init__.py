"""Attention: back ends, which one is used, cross attention to the text."""
