"""A command from its arguments to its exit code: what is printed where, whatever happens.

Results go to stdout; with `--json` exactly one JSON object, also when the command fails. Messages go to stderr.
"""

import json
import logging
import os
import signal
import sys
import threading
import tomllib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any

from cyclopts import App, CycloptsError

from wanduet.config import EngineConfig
from wanduet.errors import ConfigError, OutputError, WanduetError
from wanduet.frontends.libraries_log import handlers
from wanduet.frontends.options import SETTINGS_FILE, decoded

_TRUE = ("1", "true", "t", "yes", "y", "on")


def run(command: App, arguments: Sequence[str]) -> int:
    """The exit code of a command: 0 done, 1 it failed, 2 bad usage, 130 interrupted."""
    _prepare_output()
    as_json = _wants_json(arguments, {})
    try:
        settings = _read_settings(command)
        as_json = _wants_json(arguments, settings)
        with _second_interrupt_ends(as_json):
            command(list(arguments), exit_on_error=False, print_error=False, result_action="return_none")
            sys.stdout.flush()
    except WanduetError as error:
        return _fail(str(error), error.code, error.exit_code, as_json, field=getattr(error, "field", None))
    except CycloptsError as error:
        return _fail(str(error).strip(), "bad_usage", 2, as_json)
    except KeyboardInterrupt:
        return _fail("Interrupted.", "cancelled", 130, as_json)
    except BrokenPipeError:  # the reader of our output has gone
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        message = f"Something that wanduet did not expect: {type(error).__name__}: {reason}"
        return _fail(f"{message}\n  Please report it with what stands above.", "internal_error", 1, as_json)
    return 0


def emit(value: Mapping[str, Any], as_json: bool) -> None:
    """Print a result: one JSON object, or the same for people. Raises OutputError where stdout takes nothing."""
    try:
        if as_json:
            print(_json(value))
        else:
            from wanduet.frontends.show import show

            show(value)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        with suppress(OSError, ValueError):  # what is still in the buffer must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"The result cannot be printed: {error.strerror}.") from error


def _json(value: Mapping[str, Any]) -> str:
    # A console of another encoding would turn what it cannot show into question marks.
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not is_utf8)


def _fail(message: str, code: str, exit_code: int, as_json: bool, field: str | None = None) -> int:
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)
    if as_json:
        with suppress(OSError, ValueError):
            print(_json({"error": {"message": message, "code": code, "param": field}}), flush=True)
    return exit_code


def _wants_json(arguments: Sequence[str], settings: Mapping[str, Any]) -> bool:
    """Whether a failure must be told as JSON too: flag, environment, file, in this order."""
    flags = list(arguments)[: list(arguments).index("--")] if "--" in arguments else arguments
    for flag in reversed(flags):
        name, _, value = flag.partition("=")
        if name in ("--json", "--no-json"):
            return (name == "--json") == (not value or value.lower() in _TRUE)
    if text := os.environ.get("WANDUET_JSON"):
        return text.lower() in _TRUE
    return settings.get("json") is True


def _read_settings(command: App) -> dict[str, Any]:
    """`wanduet.toml` of this folder, {} if there is none. Raises ConfigError, also for names that are no settings."""
    path = Path(SETTINGS_FILE)
    try:
        if not path.exists():
            return {}
        settings = tomllib.loads(decoded(path.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no TOML: {error}.") from error
    known = _setting_names(command)
    for name, value in settings.items():
        if name.replace("_", "-") not in known or isinstance(value, dict):
            near = get_close_matches(name.replace("_", "-"), known, 1)
            hint = "Settings stand at the top of the file, without sections, named like the flags."
            raise ConfigError(
                f"{path}: {name!r} is no setting.",
                hint=f"Did you mean {near[0].replace('-', '_')}?" if near and not isinstance(value, dict) else hint,
            )
    return settings


def _setting_names(command: App) -> set[str]:
    """Names of every flag of every command."""
    found: set[str] = set()
    for name in command:
        inner = command[name]
        if name.startswith("-"):
            continue
        found |= _setting_names(inner)
        if inner.default_command is not None:
            for argument in inner.assemble_argument_collection():
                found |= {flag.lstrip("-") for flag in argument.names}
    return found


@contextmanager
def _second_interrupt_ends(as_json: bool) -> Iterator[None]:
    """The first Ctrl-C raises KeyboardInterrupt, which lets the job stop in order; the second ends the process."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else decides what Ctrl-C means
        return
    interrupted = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if not interrupted:
            interrupted = True
            raise KeyboardInterrupt
        _fail("Stopped at once.", "cancelled", 130, as_json)
        os._exit(130)  # threads may be in the middle of a step that takes minutes

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _prepare_output() -> None:
    """Warnings of ours as plain lines; libraries' chatter away from the user."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a prompt in any script, on any console
    logging.basicConfig(level=logging.WARNING, handlers=handlers(EngineConfig().data_folder, sys.stderr))
    logging.captureWarnings(True)  # they are libraries'
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads of PyTorch's CPU wheels wait for each other spinning; where another program has their core, one
        # pool of as many threads as cores spins for most of the time. Read when torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra to install instead of failing on an import. Raises ConfigError."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "wanduet":
            raise
        raise missing_extra(name) from None


def missing_extra(name: str) -> ConfigError:
    """What a user hears whose installation lacks an extra's packages."""
    return ConfigError(f"The {name}'s packages are not installed.", hint=f"pip install 'wanduet[{name}]'")
