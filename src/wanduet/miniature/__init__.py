"""The bundled miniature: a small Wan trained from scratch on a procedural world, and how it is made."""
