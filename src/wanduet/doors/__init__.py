"""What users meet: command line, HTTP, page, diffusers' call."""
