"""The Wan family: the shapes and defaults of its members, by name. Does not import torch."""
