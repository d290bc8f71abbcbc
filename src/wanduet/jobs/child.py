"""The command and environment for child Python processes, which must not import modules from the current folder.

`python -m` puts the current folder first on the module path; a `json.py` that happens to be there would be executed.
"""

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path


def module_command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of this package, without the current folder on the module path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` changed so that a child imports this package from any folder, and nothing from the current one.

    If the package runs from a checkout, its `src` is added to `PYTHONPATH`. Empty entries of `PYTHONPATH`, which mean
    the current folder, are removed; relative ones become absolute. `PYTHONSAFEPATH` does the same for grandchildren.
    """
    root = Path(__file__).resolve().parents[2]
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    given = [os.path.abspath(entry) for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    entries = given if root in installed else [*given, str(root)]
    found = {**environment, "PYTHONSAFEPATH": "1"}
    found.pop("PYTHONPATH", None)
    if entries:
        found["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(entries))
    return found
