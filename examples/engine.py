"""The engine in Python: two jobs, the progress of each, and where the videos are."""

from wanduet import Engine, EngineConfig, GenerationRequest, OutputOptions

PROMPTS = ("a red circle moving left on a beige background", "sunrise over the sea")

if __name__ == "__main__":  # on several GPUs the engine starts processes, which import this file
    with Engine(EngineConfig(model="miniature")) as engine:
        jobs = [
            engine.submit(GenerationRequest(prompt=prompt, seed=number), OutputOptions(f"engine-{number}.mp4"))
            for number, prompt in enumerate(PROMPTS)
        ]
        for job in jobs:  # while one is decoded, the next is denoised
            for event in job.events():
                print(event)
            print(job.result().videos[0].path)
