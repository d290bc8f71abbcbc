"""How further Python processes of this package are started: they run its code and never that of the folder they begin in.

`python -m` would put the folder where somebody started a server first on the module path, and a `json.py` that happens
to lie there would be executed.
"""

import os
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this package without the current folder on the module path."""
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with which the package is found from any folder, and the current one is not searched.

    A checkout's `src` is passed on, as nobody installed it; of `PYTHONPATH`, empty entries go, which mean the current
    folder, and relative ones become absolute. `PYTHONSAFEPATH` is for what the process itself starts.
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
