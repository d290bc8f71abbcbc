"""The members of the model family: their shapes and defaults. No torch here."""
