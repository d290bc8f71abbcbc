"""The commands of the command line; those of servers and clusters are in `jobs.py` and `cluster.py`.

Results go to stdout, progress and messages to stderr. With `--json` stdout gets exactly one JSON object.
Exit codes: 0 done, 1 the job failed, 2 bad usage, 130 interrupted by Ctrl-C, 128 + N by signal N:
143 by SIGTERM, 129 by a closed terminal, 152 by the limit of CPU time.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.config import Env

from wanduet.doors.cli import completion, jobs
from wanduet.doors.cli.embeddings import prompt_of
from wanduet.doors.cli.help import EVERYWHERE, KEEP, LOOK, MAKE, concise, plain_overview
from wanduet.doors.cli.options import SETTINGS_FILE, EngineFlags, Settings, VideoFlags, drop_overruled, whole
from wanduet.doors.cli.places import Place, parse_place, place
from wanduet.doors.cli.run import emit, run
from wanduet.doors.cli.validate import check_folder, check_output, early_request, read_batch

Json = Annotated[bool, Parameter(name="--json", help="Print one JSON object on stdout.")]
Codec = Annotated[str, Parameter(help="h264, av1, vp9, or ffv1 (lossless).")]
Quality = Annotated[int | None, Parameter(help="1 (smallest file) to 100 (best). Default: 75.", converter=whole)]
Form = Literal["full", "bf16", "comfy"]
PLACE: dict[str, Any] = {"converter": place, "accepts_keys": False, "n_tokens": 1, "metavar": "PATH"}
OUTPUT = Parameter(name=["--output", "-o"], help="Path of the video, or a folder to put it in.", **PLACE)
Output = Annotated[Place | None, OUTPUT]
Embeddings = Annotated[
    tuple[Path, ...],
    Parameter(help="A file of `wanduet encode`: its prompt is not encoded again. Give it once for each.", negative=""),
]
FIRST_SIGNAL = 128  # exit codes from here on are 128 + the signal's number
LONGEST_PROMPT = 512 * "-"  # maximum length: a plan for it is valid for every prompt
WANTED, OTHER = VideoFlags(), EngineFlags()

app = App(
    name="wanduet",
    help="Text to video with Wan2.1, on one GPU, two, or many.",
    config=[
        Env("WANDUET_", command=False),
        Settings(SETTINGS_FILE, allow_unknown=True, use_commands_as_keys=False),
        drop_overruled,
    ],
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,
    help_formatter=concise,
    help_epilogue=EVERYWHERE,
)


@app.command(group=MAKE)  # each flag is a parameter
def generate(
    prompt: Annotated[str | None, Parameter(help="What the video shows. Default: the prompt of --embeddings.")] = None,
    *,
    video: VideoFlags = WANTED,
    engine: EngineFlags = OTHER,
    output: Output = None,
    codec: Codec = "h264",
    quality: Quality = None,
    save_latents: Annotated[bool, Parameter(help="Keep the latents in a file beside the video.")] = False,
    resume: Annotated[bool, Parameter(help="Continue an interrupted run.")] = False,
    profile: Annotated[
        bool, Parameter(help="Print where the time went, and write a trace for Perfetto beside the video.")
    ] = False,
    embeddings: Embeddings = (),
    dry_run: Annotated[bool, Parameter(help="Print the plan, and stop.")] = False,
    json_: Json = False,
) -> None:
    """Make a video from a prompt.

    ```sh
    wanduet generate "a cat walks over a frozen lake" --resolution 720p --seed 7 -o cat.mp4
    wanduet generate "a red circle moving left on a black background" --model miniature
    ```
    """
    config = engine.config()
    request = early_request(prompt_of(prompt, embeddings), video, config)
    check_output(output, codec, quality)
    from wanduet.doors.cli.commands import Ways, run_generate
    from wanduet.engine.job import OutputOptions

    where = output or parse_place("")
    options = OutputOptions(where.path, codec, quality, save_latents, resume)
    ways = Ways(dry_run, profile, embeddings)
    emit(run_generate(request, config, options, where, ways), json_)


@app.command(group=MAKE)  # each flag is a parameter
def batch(
    file: Path,
    *,
    video: VideoFlags = WANTED,
    engine: EngineFlags = OTHER,
    output: Annotated[Place | None, Parameter(name=["--output", "-o"], help="A folder.", **PLACE)] = None,
    codec: Codec = "h264",
    quality: Quality = None,
    save_latents: Annotated[bool, Parameter(help="Keep the latents beside each video.")] = False,
    resume: Annotated[
        bool, Parameter(help="Make only what an interrupted run of the same batch has not made.")
    ] = False,
    embeddings: Embeddings = (),
    json_: Json = False,
) -> None:
    """Make one video per line of a file: .txt (prompts), .jsonl (objects of fields) or .csv.

    Lines that begin with # are comments.

    ```sh
    wanduet batch prompts.txt -o videos/
    wanduet batch prompts.txt -o videos/ --resume
    ```
    """
    config = engine.config()
    requests = read_batch(file, video, config)
    check_folder(output)
    check_output(None, codec, quality)
    from wanduet.doors.cli.batch import run_batch
    from wanduet.engine.job import OutputOptions

    where = output or parse_place("")
    options = OutputOptions(where.path, codec, quality, save_latents, resume)
    done = run_batch(requests, config, options, where, embeddings)
    emit(done, json_)
    if done["failed"]:
        raise SystemExit(1)


@app.command(group=LOOK)
def plan(
    *,
    video: VideoFlags = WANTED,
    engine: EngineFlags = OTHER,
    hardware: Annotated[
        str | None, Parameter(help="Plan for other GPUs: RTX 4090, 2x3090, h100, 24 (GiB), 24GiB+12GiB.")
    ] = None,
    json_: Json = False,
) -> None:
    """Predict memory and time for a video, without loading anything.

    ```sh
    wanduet plan --resolution 720p
    wanduet plan --resolution 1080p --hardware 2x3090
    ```
    """
    config = engine.config()
    request = early_request(LONGEST_PROMPT, video, config)
    from wanduet.doors.cli.commands import run_plan

    found = run_plan(request, config, hardware)
    if json_:
        del found["settings"]  # for people
    emit(found, json_)
    if not found["fits"]:
        raise SystemExit(1)


@app.command(group=LOOK)
def bench(
    prompt: str = "a red circle moving left on a black background",
    *,
    video: VideoFlags = WANTED,
    engine: EngineFlags = OTHER,
    runs: Annotated[int, Parameter(help="Measured runs, after one to warm up.", converter=whole)] = 3,
    json_: Json = False,
) -> None:
    """Measure how long a video takes on this machine. `--model random:1.3b` needs no weights.

    ```sh
    wanduet bench --model random:1.3b --steps 4 --runs 2
    ```
    """
    config = engine.config()
    request = early_request(prompt, video, config)
    from wanduet.doors.cli.bench import run_bench

    emit(run_bench(request, config, runs), json_)


@app.command(group=LOOK)
def price(
    *,
    video: VideoFlags = WANTED,
    engine: EngineFlags = OTHER,
    prompts: Annotated[int, Parameter(help="Videos of each row, 1 to 8: the worst counts.", converter=whole)] = 4,
    json_: Json = False,
) -> None:
    """Measure what each speed takes and loses with this model on this machine, against exact videos.

    ```sh
    wanduet price --resolution 480p
    wanduet price --model miniature --height 64 --width 64 --num-frames 17 --prompts 2
    ```
    """
    config = engine.config()
    request = early_request(LONGEST_PROMPT, video, config)
    from wanduet.doors.cli.price import run_price

    emit(run_price(request, config, prompts), json_)


@app.command(group=MAKE)
def encode(
    prompt: str,
    *,
    engine: EngineFlags = OTHER,
    output: Annotated[
        Place | None, Parameter(name=["--output", "-o"], help="The embeddings' path, or a folder.", **PLACE)
    ] = None,
    json_: Json = False,
) -> None:
    """Write a prompt's embeddings to a file, for `generate --embeddings`.

    ```sh
    wanduet encode "a cat walks over a frozen lake" -o cat.safetensors
    wanduet generate --embeddings cat.safetensors --seed 7
    ```
    """
    request, config = VideoFlags().request(prompt), engine.config()
    from wanduet.doors.cli.commands import run_encode

    emit(run_encode(request.prompt, config, output or parse_place("")), json_)


@app.command(group=MAKE)
def decode(
    latents: Path,
    *,
    engine: EngineFlags = OTHER,
    output: Output = None,
    codec: Codec = "h264",
    quality: Quality = None,
    json_: Json = False,
) -> None:
    """Decode saved latents to a video. Default of --model: the one that made them.

    ```sh
    wanduet decode cat.mp4.latents.safetensors --codec ffv1
    ```
    """
    check_output(output, codec, quality)
    from wanduet.doors.cli.made import run_decode

    emit(run_decode(latents, engine, output or parse_place(""), codec, quality), json_)


@app.command(group=LOOK)
def inspect(target: str, *, engine: EngineFlags = OTHER, json_: Json = False) -> None:
    """Show what a file is and how it was made: a video, latents, embeddings, weights. A prompt: whether it is in the cache.

    ```sh
    wanduet inspect cat.mp4
    wanduet inspect wan2.1_t2v_1.3B_bf16.safetensors
    wanduet inspect "a cat walks over a frozen lake"
    ```
    """
    from wanduet.engine import tools

    emit(tools.inspect(engine.config(), target), json_)


@app.command(group=KEEP)
def download(
    *,
    trust: bool = False,
    form: Form | None = None,
    engine: EngineFlags = OTHER,
    json_: Json = False,
) -> None:
    """Fetch a model beforehand, and check every file.

    ```sh
    wanduet download
    wanduet download --form comfy
    wanduet download --transformer wan2.1-t2v-14b-Q8_0.gguf --form comfy
    wanduet download --model FOLDER --trust
    ```

    Beside files (--transformer and others), only what they lack is fetched. The model is then used by its id, without a
    network.

    Parameters
    ----------
    trust
        For a folder of weights of your own: take its files as they are, and note their hashes in it.
    form
        full: the repository for diffusers, float32. bf16: the official one, text encoder in bfloat16. comfy: the files for
        ComfyUI, the smallest: 16 bits, text encoder (14B: also transformer) in fp8. Default: that of the id.
    """
    from wanduet.doors.cli.fetch import run_download

    emit(run_download(engine.config(), trust, form), json_)


@app.command(group=KEEP)
def convert(
    source: str,
    target: Path,
    *,
    engine: EngineFlags = OTHER,
    json_: Json = False,
) -> None:
    """Write a model of any layout as a new folder in the layout of diffusers, in bfloat16 (the VAE in float32).

    ```sh
    wanduet convert Wan-AI/Wan2.1-T2V-1.3B wan-1.3b
    wanduet convert wan2.1-t2v-14b-Q8_0.gguf wan-14b --text-encoder umt5_xxl_fp16.safetensors --vae wan_2.1_vae.safetensors
    ```

    Parameters
    ----------
    source
        As --model: a folder, a file of a transformer, or a Hugging Face id that is in the cache.
    target
        The folder to write, which must not exist.
    """
    from wanduet.doors.cli.fetch import run_convert

    emit(run_convert(replace(engine, model=source).config(), target), json_)


@app.command(group=LOOK)
def verify(
    video: Path,
    *,
    max_steps: Annotated[
        int, Parameter(help="Most denoising steps that the video may say it took.", converter=whole)
    ] = 200,
    input_video: Annotated[
        Path | None,
        Parameter(help="The video that it was made from, if it was: a video's metadata have only its hash."),
    ] = None,
    lora: Annotated[
        tuple[Path, ...],
        Parameter(
            help="A LoRA that it was made with, or a folder of them: they are found by their hashes.", negative=""
        ),
    ] = (),
    engine: EngineFlags = OTHER,
    json_: Json = False,
) -> None:
    """Make a video again from its own metadata and compare every frame.

    ```sh
    wanduet verify cat.mp4
    ```
    """
    from wanduet.doors.cli.made import Inputs, run_verify

    found = run_verify(video, engine, max_steps, Inputs(input_video, lora))
    emit(found, json_)
    if not found["equal"]:
        raise SystemExit(1)


@app.command(group=KEEP)
def doctor(*, engine: EngineFlags = OTHER, json_: Json = False) -> None:
    """Show what this machine has, what is missing, and what to do.

    ```sh
    wanduet doctor --model miniature
    ```
    """
    from wanduet.doors.cli.fetch import checking_bar
    from wanduet.engine import tools

    config = engine.config()
    with checking_bar() as progress:
        found = tools.doctor(config, progress)
    emit(found, json_)


jobs.register(app)
completion.register(app, KEEP)
for flag in ("--help", "--version"):
    app[flag].group = KEEP
plain_overview(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit."""
    code = run(app, sys.argv[1:] if arguments is None else arguments)
    if code >= FIRST_SIGNAL:
        # Inside an exec(), which many libraries use, an interrupt makes Python exit by the signal instead of this code.
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
