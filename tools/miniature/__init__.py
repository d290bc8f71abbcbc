"""How the bundled miniature is made: the procedural world it learns from, its training and its evaluation."""
