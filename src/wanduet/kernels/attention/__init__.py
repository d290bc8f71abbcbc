"""Attention: backends, the choice between them, cross-attention to the text."""
