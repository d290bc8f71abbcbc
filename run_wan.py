"""The simplest door: change the three settings, then `python run_wan.py`.

Every flag of `wanduet generate` works here too and wins over the settings, for example:
    python run_wan.py --model miniature "a red circle moving left on a black background"
The miniature makes 33 frames of 96x96; there only flags change that, `--num-frames 17`.
"""

prompt = "A cat walks on the grass, realistic style, soft morning light."
num_frames = 81  # 4n + 1; 16 frames are a second
resolution = (480, 832)  # height, width; (720, 1280) and (1080, 1920) work too

if __name__ == "__main__":
    import os
    import sys
    from importlib.util import find_spec

    if find_spec("wanduet") is None:  # only its requirements are installed: run it from its source
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "src")
        sys.path.insert(0, source)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))  # for ranks
    from wanduet.doors.cli.simple import run

    run(prompt, num_frames, resolution)
