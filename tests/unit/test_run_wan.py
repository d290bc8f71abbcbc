"""`run_wan.py` where only its requirements are installed, from another folder."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# As if the package were not installed: its folder is not on the path.
CODE = """
import os, runpy, sys
os.environ.pop("PYTHONPATH", None)
sys.path[:] = [one for one in sys.path if not os.path.isdir(os.path.join(one, "wanduet"))]
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in getattr(one, "__module__", "")]
sys.argv = ["run_wan.py", "--model", "miniature", "--dry-run", "--json"]
script = {script!r}
runpy.run_path(script, run_name="__main__")
"""


def test_it_runs_from_its_source(tmp_path: Path) -> None:
    code = CODE.format(script=str(ROOT / "run_wan.py"))
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert '"fits": true' in done.stdout
