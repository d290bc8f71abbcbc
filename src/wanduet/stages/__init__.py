"""The stages of a job: denoise and decode. They depend on no job queue and on no output file."""
