"""One sequence of tokens over several ranks."""
