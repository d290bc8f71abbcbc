"""Operations, each with its plain PyTorch form beside its fused ones."""
