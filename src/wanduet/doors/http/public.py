"""What a server says to its clients: names instead of the machine's paths, and only characters that can be sent."""

import re

from wanduet.jobs.records import JobError

MESSAGE_LIMIT = 600  # characters: a message quotes what was given, which may be long
NAME_LIMIT = 100

# An absolute path of POSIX or Windows, one that begins with `~`, `.` or `..`, or an address of a file
# (`sqlite:////data/x`); not the path of an address on the net (`https://a/b`).
_BEFORE = r"(?<![\w/\\.~-])"
_START = r"(?:[A-Za-z][\w+]{0,20}:/{3,}|(?:~[\w.-]{0,40}|\.{1,2})?/(?!/)|(?<!:)//|[A-Za-z]:[\\/](?!/)|\\\\)"
_QUOTED = re.compile(rf"(?P<quote>['\"`])(?P<path>{_START}(?:(?!(?P=quote)).)+)(?P=quote)")
_BARE = re.compile(rf"{_BEFORE}{_START}[^\s'\"`,;:()<>|]+")


def public_text(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """A text without the folders of the paths in it, cut to so many characters, of valid Unicode."""
    text = _QUOTED.sub(lambda match: f"{match['quote']}{_name(match['path'])}{match['quote']}", text)
    return sendable(_BARE.sub(lambda match: _name(match[0]), text), limit)


def sendable(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """A text that UTF-8 can hold: half a character (a lone surrogate) becomes its escape."""
    text = text if len(text) <= limit else f"{text[:limit]}…"
    return text.encode("utf-8", "backslashreplace").decode()


def public_error(error: JobError) -> JobError:
    """Why a job failed, for clients. The command line shows the operator the stored one."""
    param = None if error.param is None else sendable(error.param, NAME_LIMIT)
    return JobError(error.code, public_text(error.message), error.type, param)


def _name(path: str) -> str:
    """The last part of a path; a folder's closing slash is dropped."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path
