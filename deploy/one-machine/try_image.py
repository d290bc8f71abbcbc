"""Run the steps of the Dockerfile without a container: its `pip install` lines in a fresh virtual environment, on copies of
the files that it takes, and then its command and its health check, with the bundled miniature.

    python deploy/one-machine/try_image.py          # a few minutes: it fetches all packages
    python deploy/one-machine/try_image.py --dry    # only says what it would do, and checks that the files are there

Steps that need root (apt-get, useradd) are left out.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WAIT_SECONDS = 300.0  # for the server to be ready


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions, such as `("COPY", "src src")`."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        name, _, rest = line.strip().partition(" ")
        found.append((name.upper(), " ".join(rest.split())))
    return found


def steps(text: str) -> list[tuple[str, list[str]]]:
    """Return what is done, in order: `("copy", [source, ...])` and `("pip", arguments)`. Raises SystemExit."""
    found: list[tuple[str, list[str]]] = []
    for name, rest in instructions(text):
        words = shlex.split(rest)
        if name == "COPY":
            sources = words[:-1]
            for source in sources:
                if not (ROOT / source).exists():
                    raise SystemExit(f"COPY {rest}: there is no {source}")
            found.append(("copy", sources))
        elif name == "RUN" and words[:2] == ["pip", "install"]:
            found.append(("pip", words[1:]))
    return found


def command(text: str) -> list[str]:
    """Return the image's command."""
    given = dict(instructions(text))
    return [*json.loads(given["ENTRYPOINT"]), *json.loads(given["CMD"])]


def health_check(text: str) -> list[str]:
    """Return the command of the health check."""
    words: list[str] = json.loads(re.sub(r"^.*?CMD ", "", dict(instructions(text))["HEALTHCHECK"]))
    return words


def run(text: str, folder: Path) -> None:
    """Do all steps in a folder. Raises CalledProcessError, or SystemExit if the server is not ready in time."""
    venv.create(folder / "venv", with_pip=True)
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    work = folder / "work"
    work.mkdir()
    for kind, words in steps(text):
        print(f"{kind} {shlex.join(words)}", flush=True)
        if kind == "pip":
            subprocess.run([programs / "python", "-m", "pip", *words], cwd=work, check=True)
            continue
        for name in words:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, work / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
            else:
                shutil.copy(source, work)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    program, *arguments = [word.replace("0.0.0.0", "127.0.0.1") for word in command(text)]
    arguments[arguments.index("8000")] = port
    data = ["--model", "miniature", "--data-dir", str(folder / "data")]
    print(shlex.join([program, *arguments, *data]), flush=True)
    server = subprocess.Popen([programs / program, *arguments, *data], cwd=folder)
    try:
        name, *check = [word.replace(":8000", f":{port}") for word in health_check(text)]
        end = time.monotonic() + WAIT_SECONDS
        while subprocess.run([programs / name, *check], stderr=subprocess.DEVNULL, check=False).returncode != 0:
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit("the server is not ready")
            time.sleep(1.0)
        print("the server is ready")
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Run, or with `--dry` only print."""
    text = (HERE / "Dockerfile").read_text()
    if "--dry" in sys.argv[1:]:
        for kind, words in steps(text):
            print(kind, shlex.join(words))
        print("run", shlex.join(command(text)))
        print("check", shlex.join(health_check(text)))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(text, Path(folder))


if __name__ == "__main__":
    main()
