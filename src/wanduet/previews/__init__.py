"""Small moving pictures of a video while it is being denoised."""
