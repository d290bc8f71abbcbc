"""A program written for diffusers: only the import is another."""

import torch

from wanduet import WanPipeline, export_to_video

if __name__ == "__main__":
    pipe = WanPipeline.from_pretrained("miniature", torch_dtype=torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    frames = pipe("a green square moving up on a navy background", generator=generator).frames[0]
    export_to_video(frames, "pipeline.mp4", fps=16)
    print("pipeline.mp4", frames.shape)
