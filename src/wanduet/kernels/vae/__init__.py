"""Operations of the VAE."""
