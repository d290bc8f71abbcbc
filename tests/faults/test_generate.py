"""`wanduet generate` interrupted and killed in every phase, as a process of its own; then resumed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import wanduet
from tests.forked import Program, start_program
from wanduet.media.read import frame_hashes

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")

PROMPT = "a red circle moving left on a black background"
STEPS = 8
BASE = ["generate", PROMPT, "--model", "miniature", "--steps", str(STEPS), "--num-frames", "5", "--resolution", "32x32"]
LOSSLESS = ["--codec", "ffv1", "--checkpoint-seconds", "0", "--json"]

# Runs the command line with one function slowed down: "paused" is printed when it is reached, which may be
# the n-th time, and it goes on only after the pause; without one, when its stdin ends.
RUNNER = """
import importlib, sys, time
module, name, nth, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
if module:
    owner = importlib.import_module(module)
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    name = name.split(".")[-1]
    whole, calls = getattr(owner, name), 0
    def slowed(*arguments, **keywords):
        global calls
        calls += 1
        if calls == nth:
            print("paused", file=sys.stderr, flush=True)
            time.sleep(seconds) if seconds else sys.stdin.read()
        return whole(*arguments, **keywords)
    setattr(owner, name, slowed)
from wanduet.doors.cli.main import main
main(sys.argv[5:])
"""
PHASES = {
    "load": ("wanduet.runtime.checkpoint", "verify_manifest", 1),
    "encode": ("wanduet.models.text.umt5", "TextEncoder._layer", 2),
    "denoise": ("wanduet.models.dit.model", "WanTransformer.forward_cfg", 5),
    "decode": ("wanduet.media.video", "VideoWriter.write", 2),
}

# What a resumed run gives is compared with a run that nobody disturbed.
Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts `wanduet ARGUMENTS`, slowed down in a phase, in an empty folder.

    `whole`: from the interpreter's start to its end, which take seconds. Otherwise it is forked after the imports.
    """
    (tmp_path / "work").mkdir()
    environment = {name: text for name, text in os.environ.items() if not name.startswith("WANDUET_")}
    environment["WANDUET_DATA_DIR"] = str(tmp_path / "data")

    def run(*arguments: str, phase: str = "", pause: float = 0.0, whole: bool = False) -> Program:
        slowed = [str(word) for word in (*PHASES.get(phase, ("", "", 0)), pause)]
        everything = [*slowed, *BASE, *LOSSLESS, *arguments]
        return start_program(RUNNER, everything, tmp_path / "work", environment, forked=not whole)

    return run


def wait_for_pause(process: Program) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip() == "paused":
            return
    raise AssertionError("the phase was never reached")


def wait_for_stop(process: Program) -> str:
    """Until a signal has reached the command; what it printed. It stays paused, however late the signal was sent."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "again to stop at once" in line:
            break
    return said


def finish(process: Program) -> tuple[int, Any, str]:
    """Its exit code, what it printed, and stderr; a run that was paused goes on."""
    out, err = process.communicate(timeout=240)
    return process.returncode, json.loads(out), err


@pytest.fixture
def resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs `wanduet generate ARGUMENTS` to its end, in this process: result and stderr."""
    from wanduet.doors.cli.main import app
    from wanduet.doors.cli.run import run

    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path / "work")

    def call(*arguments: str) -> tuple[Any, str]:
        capfd.readouterr()
        code = run(app, [*BASE, *LOSSLESS, *arguments])
        out, err = capfd.readouterr()
        assert code == 0, err
        return json.loads(out), err

    return call


@pytest.fixture
def transformer_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the transformer ran in this process."""
    from wanduet.models.dit.model import WanTransformer

    whole, calls = WanTransformer.forward_cfg, []

    def forward_cfg(self, latents, *rest, **keywords):
        calls.append(latents.shape[2])
        return whole(self, latents, *rest, **keywords)

    monkeypatch.setattr(WanTransformer, "forward_cfg", forward_cfg)
    return calls


def left(folder: Path) -> set[str]:
    """The endings of what stands in a folder, but for names that a process which is no more had taken."""
    return {name.partition(".")[2] for name in os.listdir(folder) if not name.endswith(".taken")}


STOPS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129, "SIGXCPU": 152}


@posix
@pytest.mark.parametrize("phase", [pytest.param(p, marks=[pytest.mark.slow] * (p != "denoise")) for p in PHASES])
@pytest.mark.parametrize(
    "name", ["SIGINT", "SIGXCPU", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGHUP"))]
)
def test_a_stop_in_each_phase_then_resume(start: Start, resume, tmp_path: Path, phase: str, name: str) -> None:
    process = start("--seed", "3", phase=phase, whole=name == "SIGINT")
    wait_for_pause(process)
    process.send_signal(getattr(signal, name))
    told = wait_for_stop(process)
    if name == "SIGXCPU":  # the system sends it again after each second of CPU time: that is no wish to stop at once
        assert "limit of CPU time" in told
        process.send_signal(signal.SIGXCPU)
    code, said, err = finish(process)
    err = told + err
    assert code == STOPS[name]
    assert said["error"]["code"] == "cancelled"
    assert "Traceback" not in err
    work = tmp_path / "work"
    assert left(work) <= {"mkv.latents.safetensors"}  # no video, whole or half
    assert ("--resume" in err) == (phase in ("denoise", "decode"))
    resumed, _ = resume("--seed", "3", "--resume")
    whole, _ = resume("--seed", "3", "-o", "whole.mkv")
    assert frame_hashes(work / resumed["output"]) == frame_hashes(work / whole["output"])
    assert left(work) == {"mkv"}
    assert not list((tmp_path / "data" / "checkpoints").glob("*"))


@posix
def test_killed_while_denoising_then_resume_without_naming_the_seed(
    start: Start, resume, tmp_path: Path, transformer_runs: list[int]
) -> None:
    process = start(phase="denoise", pause=60.0)
    wait_for_pause(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert left(tmp_path / "work") == set()
    resumed, err = resume("--resume")
    assert "No interrupted run" not in err
    again = len(transformer_runs)
    transformer_runs.clear()
    whole, _ = resume("--seed", str(resumed["seed"]), "-o", "whole.mkv")
    work = tmp_path / "work"
    assert frame_hashes(work / resumed["output"]) == frame_hashes(work / whole["output"])
    assert again < len(transformer_runs)  # the steps that were checkpointed were not made again


@posix
@pytest.mark.slow
def test_killed_while_writing_leaves_no_video_and_the_latents(
    start: Start, resume, tmp_path: Path, transformer_runs: list[int]
) -> None:
    process = start("-o", "clip.mkv", phase="decode", pause=60.0)
    wait_for_pause(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    work = tmp_path / "work"
    assert not (work / "clip.mkv").exists()
    assert (work / "clip.mkv.latents.safetensors").exists()
    resumed, err = resume("-o", "clip.mkv", "--resume")
    assert resumed["output"] == "clip.mkv"
    assert "No interrupted run" not in err
    assert len(transformer_runs) <= 2  # not one step again; the self-test after loading is all
    assert not (work / "clip.mkv.latents.safetensors").exists()


def test_resume_with_nothing_to_go_on_from_says_so(start: Start, resume) -> None:
    _, err = resume("--resume")
    assert "No interrupted run of this request was found" in err


@posix
@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
def test_a_second_stop_ends_at_once(start: Start, tmp_path: Path, second: str) -> None:
    process = start("--seed", "3", phase="denoise", pause=3600.0)
    wait_for_pause(process)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert "again" in process.stderr.readline()
    process.send_signal(getattr(signal, second))
    code, said, err = finish(process)  # long before the pause is over
    assert code == 130
    assert said["error"]["code"] == "cancelled"
    assert "Traceback" not in err
    assert left(tmp_path / "work") == set()


EARLY = """
import signal, sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == "cyclopts":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupts())
sys.argv = ["wanduet", "generate", "x", "--json"]
from wanduet.__main__ import main
main()
"""
IN_EXEC = """
import sys
from wanduet.doors.cli import commands
def interrupted(*_, **__):
    exec("import signal; signal.raise_signal(signal.SIGINT)")
commands.run_plan = interrupted
sys.argv = ["wanduet", "plan", "--json"]
from wanduet.__main__ import main
main()
"""
# What is raised here can reach nobody.
IN_A_FINALIZER = """
import signal, sys, time, weakref
from wanduet.doors.cli import commands
class Thing:
    pass
def interrupted(*_, **__):
    thing = Thing()
    weakref.finalize(thing, signal.raise_signal, signal.SIGINT)
    del thing
    for _ in range(30):
        time.sleep(0.1)
    return {"fits": True}
commands.run_plan = interrupted
sys.argv = ["wanduet", "plan", "--json"]
from wanduet.__main__ import main
main()
"""
# The signal comes while the result, or the failure, is being printed: it stays the one object.
WHILE_ANSWERING = """
import signal, sys
from wanduet.doors.cli import stopping
whole = stopping.to_json
def late(value):
    signal.raise_signal(signal.SIGTERM)
    return whole(value)
stopping.to_json = late
from wanduet.doors.cli import run
run.to_json = late
sys.argv = ["wanduet", "plan", "--json", "--model", "MODEL"]
from wanduet.__main__ import main
main()
"""


@posix
@pytest.mark.parametrize(
    "code", [EARLY, IN_EXEC, IN_A_FINALIZER], ids=["while importing", "inside an exec", "in a finalizer"]
)
def test_ctrl_c_at_any_moment_is_code_130(tmp_path: Path, code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130
    assert json.loads(done.stdout)["error"]["code"] == "cancelled"
    assert "Traceback" not in done.stderr


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_stop_while_importing_is_128_and_its_number(tmp_path: Path, name: str) -> None:
    code = EARLY.replace("SIGINT", name)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 128 + getattr(signal, name)
    assert json.loads(done.stdout)["error"]["code"] == "cancelled"


@posix
@pytest.mark.parametrize(("model", "code"), [("random:1.3b", 0), ("random:none", 1)])
def test_a_stop_while_the_answer_is_printed_changes_nothing(tmp_path: Path, model: str, code: int) -> None:
    script = WHILE_ANSWERING.replace("MODEL", model)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code or (model, done.returncode) == ("random:1.3b", 1)  # it may not fit here
    assert ("error" in json.loads(done.stdout)) == (model == "random:none")
    assert "Traceback" not in done.stderr


@posix
def test_a_hangup_that_is_to_be_ignored_is(start: Start, tmp_path: Path) -> None:
    """As `nohup` starts a command."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("--seed", "3", phase="denoise", pause=0.5, whole=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_pause(process)
    process.send_signal(signal.SIGHUP)
    code, said, _ = finish(process)
    assert (code, said["seed"]) == (0, 3)


def test_two_runs_of_one_prompt_make_two_videos(start: Start, tmp_path: Path) -> None:
    """Together in one folder, without a name: each has its own video."""
    processes = [start("--seed", str(seed), phase="denoise") for seed in (1, 2)]
    for process in processes:
        wait_for_pause(process)
    outputs = set()
    for process in processes:
        code, said, err = finish(process)
        assert code == 0, err
        outputs.add(said["output"])
    assert len(outputs) == 2
    assert set(os.listdir(tmp_path / "work")) == outputs


def test_a_second_run_with_the_same_output_is_refused(start: Start, tmp_path: Path) -> None:
    first = start("-o", "clip.mkv", "--seed", "1", phase="denoise")
    wait_for_pause(first)
    code, said, err = finish(start("-o", "clip.mkv", "--seed", "2"))
    assert (code, said["error"]["code"]) == (1, "output_error")
    assert "another run of wanduet is writing it" in err
    code, said, _ = finish(first)
    assert (code, said["output"], said["seed"]) == (0, "clip.mkv", 1)
    assert os.listdir(tmp_path / "work") == ["clip.mkv"]


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "wanduet", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, wanduet.__version__)


@posix
@pytest.mark.slow
def test_ctrl_c_stops_a_batch(start: Start, tmp_path: Path) -> None:
    (tmp_path / "work" / "prompts.txt").write_text("x\ny\nz\n")
    environment = {**os.environ, "WANDUET_DATA_DIR": str(tmp_path / "data")}
    module, name, nth = PHASES["denoise"]
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER, module, name, str(nth), "0", "batch", "prompts.txt", *BASE[2:], "--json"],
        cwd=tmp_path / "work", env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_pause(process)
    process.send_signal(signal.SIGINT)
    wait_for_stop(process)
    code, said, err = finish(process)
    assert code == 130
    assert "0 of 3 videos" in said["error"]["message"]
    assert "Traceback" not in err
    assert os.listdir(tmp_path / "work") == ["prompts.txt"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from wanduet.doors.cli.main import main
main(sys.argv[2:])
"""


def limited(tmp_path: Path, size: int, *arguments: str) -> tuple[int, Any, str]:
    """`wanduet generate` where no file can be larger than `size` bytes: what `finish` gives."""
    environment = {**os.environ, "WANDUET_DATA_DIR": str(tmp_path / "data")}
    (folder := tmp_path / "full").mkdir()
    options = ["--codec", "ffv1", "--json", "--seed", "1"]
    return finish(start_program(LIMITED, [str(size), *BASE, *options, *arguments], folder, environment))


@posix
def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    code, said, err = limited(tmp_path, 2000)
    assert code == 1
    assert said["error"]["code"] == "output_error"
    assert "Traceback" not in err
    assert os.listdir(tmp_path / "full") == []


@posix
@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_costs_the_checkpoint_only(tmp_path: Path) -> None:
    code, _, _ = limited(tmp_path, 9000, "--checkpoint-seconds", "0")
    assert code == 0
    assert len(os.listdir(tmp_path / "full")) == 1
