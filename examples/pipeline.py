"""A program written for diffusers: only the import is another."""

import torch

from wanduet import WanPipeline, export_to_video

if __name__ == "__main__":
    pipe = WanPipeline.from_pretrained("miniature", torch_dtype=torch.float32)
    generator = torch.Generator("cpu").manual_seed(0)
    size = {
        "height": 96,
        "width": 96,
        "num_frames": 33,
    }  # the miniature's; the defaults are those of Wan2.1, as in diffusers
    prompt = "a green square moving up on a navy background"
    frames = pipe(prompt, **size, num_inference_steps=20, guidance_scale=3.0, generator=generator).frames[0]
    export_to_video(frames, "pipeline.mp4", fps=16)
    print("pipeline.mp4", frames.shape)
