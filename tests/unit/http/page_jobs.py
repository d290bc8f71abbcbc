"""A job as the page shows it."""

from wanduet.jobs.records import StoredJob

REQUEST = {
    "prompt": "<script>alert(1)</script> & 'co\"",
    "negative_prompt": "<i>none</i>",
    "width": 832,
    "height": 480,
    "num_frames": 81,
    "fps": 16,
    "num_inference_steps": 50,
    "guidance_scale": 6.0,
    "flow_shift": 8.0,
    "sampler": "unipc",
    "seed": 7,
}
JOB = StoredJob("video_" + "0" * 32, "local", "m", REQUEST, "queued")
