"""The stages of a job: encode a prompt, denoise, decode. They know neither jobs nor files."""
