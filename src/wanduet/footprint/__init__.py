"""How many bytes each phase of a job needs, from shapes alone."""
