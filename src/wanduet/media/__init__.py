"""Video, latent, embedding and image files, and the metadata in them."""
