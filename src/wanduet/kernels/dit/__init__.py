"""Operations of the transformer."""
