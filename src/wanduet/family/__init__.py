"""The models of the Wan family: their shapes and defaults. Does not import torch."""
