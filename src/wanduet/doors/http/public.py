"""Makes texts safe to send to clients: paths of this machine become file names, and invalid Unicode is escaped."""

import re

from wanduet.jobs.records import JobError

MESSAGE_LIMIT = 600  # characters: a message may quote a long input
NAME_LIMIT = 100

# Matches absolute POSIX and Windows paths, paths that begin with `~`, `.` or `..`, and addresses of files
# (`sqlite:////data/x`); not the path of a network address (`https://a/b`).
_BEFORE = r"(?<![\w/\\.~-])"
_START = r"(?:[A-Za-z][\w+]{0,20}:/{3,}|(?:~[\w.-]{0,40}|\.{1,2})?/(?!/)|(?<!:)//|[A-Za-z]:[\\/](?!/)|\\\\)"
_QUOTED = re.compile(rf"(?P<quote>['\"`])(?P<path>{_START}(?:(?!(?P=quote)).)+)(?P=quote)")
_BARE = re.compile(rf"{_BEFORE}{_START}[^\s'\"`,;:()<>|]+")


def public_text(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Return a text without the folders of its paths, as valid Unicode, cut to `limit` characters."""
    text = _QUOTED.sub(lambda match: f"{match['quote']}{_name(match['path'])}{match['quote']}", text)
    return sendable(_BARE.sub(lambda match: _name(match[0]), text), limit)


def sendable(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """Return a text that UTF-8 can encode (a lone surrogate becomes its escape), cut to `limit` characters."""
    text = text if len(text) <= limit else f"{text[:limit]}…"
    return text.encode("utf-8", "backslashreplace").decode()


def public_error(error: JobError) -> JobError:
    """Return a job's error for clients, without paths. The command line shows the operator the stored error."""
    param = None if error.param is None else sendable(error.param, NAME_LIMIT)
    return JobError(error.code, public_text(error.message), error.type, param)


def _name(path: str) -> str:
    """Return the last part of a path, without a trailing slash."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path
