"""Runs a command: from its arguments to its output and its exit code, for all kinds of errors.

Results go to stdout; with `--json` exactly one JSON object, also when the command fails. Messages go to stderr.
"""

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from cyclopts import App, CycloptsError

from wanduet.config import EngineConfig
from wanduet.doors.cli.libraries_log import handlers
from wanduet.doors.cli.messages import never_fail_on_stderr
from wanduet.doors.cli.near import explain, with_help
from wanduet.doors.cli.options import RENAMED, SETTINGS_FILE, parse_settings
from wanduet.doors.cli.stopping import StopSignals, begin_answer, print_failure, stop_signals, to_json
from wanduet.errors import CancelledError, ConfigError, OutputError, WanduetError
from wanduet.untrusted import cut, printable

_TRUE = ("1", "true", "t", "yes", "y", "on")


def run(command: App, arguments: Sequence[str]) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 bad usage, 130 interrupted, 128 + N by signal N."""
    _prepare_output()
    with stop_signals(_wants_json(arguments, {})) as stops:
        try:
            return _run(command, arguments, stops)
        except KeyboardInterrupt:
            _fail("Interrupted.", "cancelled", stops)
            return stops.exit_code


def _run(command: App, arguments: Sequence[str], stops: StopSignals) -> int:
    try:
        settings = _read_settings(command)
        stops.as_json = _wants_json(arguments, settings)
        _refuse_renamed(arguments)
        arguments = with_help(arguments)
        command(arguments, exit_on_error=False, print_error=False, result_action="return_none")
        sys.stdout.flush()
    except CancelledError as error:
        _fail(str(error), error.code, stops)
        return stops.exit_code
    except WanduetError as error:
        _fail(str(error), error.code, stops, field=getattr(error, "field", None))
        return error.exit_code
    except CycloptsError as error:
        _fail(explain(error, arguments, command), "bad_usage", stops)
        return 2
    except BrokenPipeError:  # the reader of stdout has closed the pipe
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except Exception as error:
        if (reason := _database_error(error)) is not None:
            message = f"The job database cannot be used just now: {reason}.\n  Try again in a while."
            _fail(message, "store_unavailable", stops)
            return 1
        traceback.print_exc(file=sys.stderr)
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        message = f"Something that wanduet did not expect: {type(error).__name__}: {reason}"
        _fail(f"{message}\n  Please report it with what stands above.", "internal_error", stops)
        return 1
    return 0


def emit(value: Mapping[str, Any], as_json: bool) -> None:
    """Print a result as one JSON object, or formatted for people. Raises OutputError if stdout cannot be written."""
    begin_answer()
    try:
        if as_json:
            print(to_json(value))
        else:
            from wanduet.doors.cli.show import show

            show(value)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        with suppress(OSError, ValueError):  # flushing the buffer must not fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"The result cannot be printed: {error.strerror}.") from error


def _database_error(error: Exception) -> str | None:
    """Return a database error's message: locked, full, or not reachable; None for any other error."""
    known = sys.modules.get("sqlalchemy.exc")  # if not imported, this cannot be a database error
    if known is None or not isinstance(error, known.SQLAlchemyError):
        return None
    message_lines = str(getattr(error, "orig", None) or error).strip().splitlines() or ["no reason given"]
    return message_lines[0].rstrip(".")


def _fail(message: str, code: str, stops: StopSignals, field: str | None = None) -> None:
    stops.answered = True
    print_failure(printable(message), code, stops.as_json, field)


def _wants_json(arguments: Sequence[str], settings: Mapping[str, Any]) -> bool:
    """Return whether to print failures as JSON: decided by flag, else environment, else settings file."""
    flags = list(arguments)[: list(arguments).index("--")] if "--" in arguments else arguments
    for flag in reversed(flags):
        name, _, value = flag.partition("=")
        if name in ("--json", "--no-json"):
            return (name == "--json") == (not value or value.lower() in _TRUE)
    if text := os.environ.get("WANDUET_JSON"):
        return text.lower() in _TRUE
    return settings.get("json") is True


def _read_settings(command: App) -> dict[str, Any]:
    """Return this folder's `wanduet.toml`; {} if there is none.

    Raises ConfigError, also for unknown names and for a current folder that has been removed.
    """
    path = Path(SETTINGS_FILE)
    try:
        Path.cwd()
    except OSError as error:
        raise ConfigError(f"The current folder cannot be used: {error.strerror}.", hint="Change to another.") from error
    try:
        if not path.exists():
            return {}
        settings = parse_settings(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no TOML: {cut(error)}.") from error
    known = _setting_names(command)
    for name, value in settings.items():
        if new := RENAMED.get(name.replace("_", "-")):
            raise ConfigError(f"{path}: {name} is named {new.replace('-', '_')} now.")
        if name.replace("_", "-") not in known or isinstance(value, dict):
            from difflib import get_close_matches

            near = get_close_matches(name.replace("_", "-"), known, 1)
            hint = "Settings stand at the top of the file, without sections, named like the flags."
            raise ConfigError(
                f"{path}: {cut(name)!r} is no setting.",
                hint=f"Did you mean {near[0].replace('-', '_')}?" if near and not isinstance(value, dict) else hint,
            )
    return settings


def _refuse_renamed(arguments: Sequence[str]) -> None:
    """Raise ConfigError for a flag or a variable of the environment that has another name now."""
    flags = list(arguments)[: list(arguments).index("--")] if "--" in arguments else arguments
    given = {flag.partition("=")[0] for flag in flags}
    for old, new in RENAMED.items():
        if f"--{old}" in given:
            raise ConfigError(f"--{old} is named --{new} now.")
        variable, now = (f"WANDUET_{name.replace('-', '_').upper()}" for name in (old, new))
        if variable in os.environ:
            raise ConfigError(f"{variable} is named {now} now.")


def _setting_names(command: App) -> set[str]:
    """Return the names of all flags of all commands."""
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


def _prepare_output() -> None:
    """Set up the standard streams and logging: wanduet's warnings as plain lines, libraries' messages in a file."""
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A prompt may be in any script, on any console.
            stream.reconfigure(encoding=_encoding_of(stream), errors="replace")
    never_fail_on_stderr()
    logging.basicConfig(level=logging.WARNING, handlers=handlers(EngineConfig().data_folder, sys.stderr))
    logging.captureWarnings(True)  # they come from libraries
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads of PyTorch's CPU wheels spin while they wait for each other; if another program uses one of the cores,
        # a pool of as many threads as cores spins most of the time. The variable is read when torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _encoding_of(stream: TextIO) -> str | None:
    """Return UTF-8 for files and pipes on Windows, whose default lacks most scripts; None keeps the encoding.

    An encoding that the user has set is kept.
    """
    chosen = "PYTHONIOENCODING" in os.environ
    return "utf-8" if sys.platform == "win32" and not chosen and not stream.isatty() else None


def _open_standard_streams() -> None:
    """Open standard streams that the caller closed (`>&-`).

    Else the next opened file would get their descriptors, and what a library prints would end up in a video.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is `fd`
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open until the end
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Convert an ImportError to a ConfigError that names the extra to install."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "wanduet":
            raise
        raise missing_extra(name) from None


def missing_extra(name: str) -> ConfigError:
    """Return the error for a missing extra."""
    return ConfigError(
        f"The {name}'s packages are not installed.", hint=f"pip install -e '.[{name}]' in wanduet's folder"
    )
