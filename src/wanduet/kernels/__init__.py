"""Operations of the models: for each the plain PyTorch form, which is the reference, and fused forms."""
