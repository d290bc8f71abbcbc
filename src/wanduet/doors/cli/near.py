"""Answers a command line that is nearly right with the one that was probably meant."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cyclopts import App, CycloptsError, MissingArgumentError, UnknownCommandError, UnknownOptionError

# Commands by other words for them, some from other programs.
WORDS = {
    "run": "generate", "make": "generate", "create": "generate", "gen": "generate", "render": "generate",
    "video": "generate", "prompt": "generate", "t2v": "generate", "txt2vid": "generate", "sample": "generate",
    "estimate": "plan", "predict": "plan", "dry-run": "plan", "memory": "plan", "info": "inspect", "show": "inspect",
    "metadata": "inspect", "view": "inspect", "benchmark": "bench", "pull": "download", "fetch": "download",
    "get": "download", "setup": "download", "web": "ui", "webui": "ui", "gui": "ui", "gradio": "ui", "page": "ui",
    "server": "serve", "start": "serve", "api": "serve", "ls": "jobs list", "list": "jobs list",
    "queue": "jobs list", "cancel": "jobs cancel", "rm": "jobs rm", "check": "doctor", "diagnose": "doctor",
    "status": "doctor", "test": "doctor", "version": "--version", "completion": "--install-completion",
}  # fmt: skip
# Flags by their names in Wan's own generate.py, in diffusers and in other programs.
FLAGS = {
    "frame-num": "num-frames", "frames": "num-frames", "length": "num-frames", "duration": "seconds",
    "size": "resolution", "sample-steps": "steps", "num-steps": "steps", "sampling-steps": "steps",
    "sample-shift": "flow-shift", "shift": "flow-shift", "sample-guide-scale": "guidance-scale",
    "cfg": "guidance-scale", "cfg-scale": "guidance-scale", "guidance": "guidance-scale", "sample-solver": "sampler",
    "scheduler": "sampler", "solver": "sampler", "base-seed": "seed", "save-file": "output", "out": "output",
    "output-path": "output", "file": "output", "ckpt-dir": "model", "ckpt": "model", "checkpoint": "model",
    "negative": "negative-prompt", "n-prompt": "negative-prompt", "gpu": "devices", "gpus": "devices",
    "device": "devices", "vram": "vram-limit", "num-videos": "num-videos-per-prompt", "dtype": "transformer-dtype",
    "teacache": "step-cache", "offload-model": "vram-limit", "t5-cpu": "text-encoder-device", "video": "input-video",
}  # fmt: skip
LISTS = (".txt", ".jsonl", ".ndjson", ".csv", ".tsv")  # files of prompts
LOOKED_INTO = (".mp4", ".mkv", ".webm", ".mov", ".safetensors", ".gguf", ".pth")
PROMPTED = ("generate", "encode", "bench")  # commands that take a prompt
_A_LORA = re.compile(r"\.(?:safetensors|pt|pth|bin|ckpt)(?::|$)")
LONGEST = 200  # characters of a word that is repeated
_PLAIN = re.compile(r"[\w\s.,;:()/@=+-]*")


def with_help(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, `help COMMAND` as `COMMAND --help`."""
    given = list(arguments)
    return [*given[1:], "--help"] if given[:1] == ["help"] else given


def explain(error: CycloptsError, arguments: Sequence[str], app: App) -> str:
    """Return the message for a command line that cannot be parsed, with the command or the flag that was meant.

    `arguments`: the whole command line. `app`: all commands.
    """
    chain, unused = list(error.command_chain or ()), list(error.unused_tokens or ())
    match error:
        case UnknownCommandError():
            return _no_command(chain, unused, app)
        case UnknownOptionError() if meant := FLAGS.get(_bare(error.token.keyword or "")):
            if f"--{meant}" in _flags(app, chain):
                return f"There is no flag {error.token.keyword}.\n  Did you mean: --{meant}"
        case MissingArgumentError() if error.keyword is not None:
            return f"{error.keyword} needs a value.\n  See {_line([*chain, '--help'])}"
        case MissingArgumentError() if error.argument is not None and not unused:
            name = error.argument.names[0].lstrip("-") if error.argument.names else "argument"
            missing = "A prompt is" if name == "prompt" else f"{name.upper()} is"
            return f"{missing} missing.\n  {_example(app, chain)}"
        case _ if unused and chain and not isinstance(error, MissingArgumentError):
            return _too_many(chain, unused, arguments)
    return str(error).strip()


def _no_command(chain: list[str], words: list[str], app: App) -> str:
    """`words`: what follows the commands of `chain`; the first of them is no command."""
    inner, first = app, words[0]
    for name in chain:
        inner = inner[name]
    names = [name for name in inner if not name.startswith("-")]
    shown = " ".join([*chain, _quoted(first)])
    everything = f"All commands: {_line([*chain, '--help'])}"
    if first.startswith("-"):
        if not chain and first.partition("=")[0] in _flags(app, ["generate"]):
            return f"A command is missing before {first}.\n  Did you mean: {_line(['generate', *words])}"
        return f"There is no flag {shown} before a command.\n  {everything}"
    text = f"There is no command {shown}."
    known = {name: name for name in names} | ({} if chain else WORDS)
    from difflib import get_close_matches

    if near := get_close_matches(first.lower(), known, 1, 0.75):
        meant = known[near[0]]
        rest = _joined(meant, words[1:]) or (["a cat"] if meant == "generate" else [])
        return f"{text}\n  Did you mean: {_line([*chain, *meant.split(), *rest])}"
    if chain:
        return f"{text}\n  {everything}"
    suffix = Path(first).suffix.lower()
    if suffix in (*LISTS, *LOOKED_INTO) and not any(letter.isspace() for letter in first):
        command = "batch" if suffix in LISTS else "inspect"
        return f"{text}\n  Did you mean: {_line([command, *words])}"
    prompt = _joined("generate", words)
    if any(letter.isspace() for letter in prompt[0].strip()):
        return f"A command is missing before the prompt.\n  Did you mean: {_line(['generate', *prompt])}"
    return f"{text}\n  To make a video of it: {_line(['generate', *prompt])}\n  {everything}"


def _too_many(chain: list[str], unused: list[str], arguments: Sequence[str]) -> str:
    command, rest = " ".join(chain), list(arguments)[len(chain) :]
    if (meant := _with_flag_for_each(rest)) != rest:
        return f"--lora takes one file: give it once for each.\n  Did you mean: {_line([*chain, *meant])}"
    first = rest[0] if rest and not rest[0].startswith("-") else None
    if command in PROMPTED:
        if first is None or rest[1 : 1 + len(unused)] != unused:
            return f"There is more than one prompt.\n  Put all of it in quotes: {_line([*chain, 'a cat walks'])}"
        return f"The prompt needs quotes.\n  Did you mean: {_line([*chain, *_joined(command, rest)])}"
    kept = [word for word in rest if word not in unused]
    why = ": a plan is the same for every prompt" if command == "plan" else ""
    given = " ".join(map(_quoted, unused))
    return f"`wanduet {command}` does not take {given}{why}.\n  Did you mean: {_line([*chain, *kept])}"


def _with_flag_for_each(words: Sequence[str]) -> list[str]:
    """Return the words with `--lora` before each LoRA that follows another one without it."""
    found: list[str] = []
    among_loras = False
    for before, word in zip(["", *words], words, strict=False):
        if before == "--lora" or word.startswith("--lora="):
            among_loras = True
        elif word.startswith("-") or not among_loras:
            among_loras = False
        elif _A_LORA.search(word) or os.path.exists(word):  # unlike Path's, it is False for any text
            found.append("--lora")
        found.append(word)
    return found


def _joined(command: str, words: Sequence[str]) -> list[str]:
    """Return the words with those before the first flag as one prompt, if the command takes one."""
    if command not in PROMPTED:
        return list(words)
    end = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    return [*([" ".join(words[:end])] if end else []), *words[end:]]


def _flags(app: App, chain: Sequence[str]) -> set[str]:
    for name in chain:
        app = app[name]
    return {name for argument in app.assemble_argument_collection() for name in argument.names}


def _bare(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-").lower()


def _example(app: App, chain: Sequence[str]) -> str:
    """Return the first example in a command's help."""
    for name in chain:
        app = app[name]
    found = re.search(r"^\s*(wanduet .+)$", app.help or "", re.MULTILINE)
    return f"For example: {found[1]}" if found else f"See {_line([*chain, '--help'])}"


def _line(words: Sequence[str]) -> str:
    return " ".join(["wanduet", *map(_quoted, words)])


def _quoted(word: str) -> str:
    """Quote a word as its shell reads it, in double quotes if that is enough in every shell."""
    if len(word) > LONGEST:
        return "PROMPT"
    if _PLAIN.fullmatch(word):
        return f'"{word}"' if not word or any(letter.isspace() for letter in word) else word
    return subprocess.list2cmdline([word]) if sys.platform == "win32" else shlex.quote(word)
