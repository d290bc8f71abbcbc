"""A PostgreSQL server of our own for one test: in a temporary folder, reached through a Unix socket only."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import pytest

INSTALL = "PostgreSQL is not installed: `apt-get install postgresql`, or its bin folder on PATH"


def find(program: str) -> str | None:
    """A program of PostgreSQL, on PATH or where Debian keeps it."""
    debian = sorted(glob(f"/usr/lib/postgresql/*/bin/{program}"), key=lambda path: int(Path(path).parts[4]))
    return shutil.which(program) or next(reversed(debian), None)


def _other_user() -> pwd.struct_passwd | None:
    """Who runs it, for it refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {user.pw_name: user for user in pwd.getpwall()}
    user = known.get("postgres") or known.get("nobody")
    if user is None:
        pytest.skip("PostgreSQL does not run as root, and there is no other user")
    return user


def need(*packages: str) -> None:
    """Skip the test where one of these is not installed."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install -e '.[cluster]'")


@contextmanager
def postgres(**settings: object) -> Iterator[str]:
    """The address of a running, empty database, with settings of one's own; skips the test where there is none."""
    initdb, pg_ctl = find("initdb"), find("pg_ctl")
    if initdb is None or pg_ctl is None:
        pytest.skip(INSTALL)
    user = _other_user()
    with tempfile.TemporaryDirectory(prefix="wpg", dir="/tmp") as folder:  # a socket's path must be short
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        data = f"{folder}/data"
        locale = {**os.environ, "LC_ALL": "C"}

        def run(*command: str) -> None:
            switch = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            done = subprocess.run(command, capture_output=True, text=True, env=locale, cwd="/", check=False, **switch)
            assert done.returncode == 0, done.stdout + done.stderr

        run(initdb, "-D", data, "-U", "wanduet", "-A", "trust", "-E", "UTF8", "--no-sync")
        settings = {
            "listen_addresses": "''",
            "unix_socket_directories": f"'{folder}'",
            "fsync": "off",  # no power cut is tried here
            "shared_buffers": "64MB",
            **settings,
        }
        with open(f"{data}/postgresql.auto.conf", "a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in settings.items())
        run(pg_ctl, "-D", data, "-l", f"{folder}/log", "-w", "-t", "60", "start")
        try:
            yield f"postgresql+psycopg://wanduet@/postgres?host={folder}"
        finally:
            run(pg_ctl, "-D", data, "-m", "immediate", "-w", "stop")
