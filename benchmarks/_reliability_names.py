"""How many outputs are lost when programs choose their names at the same time: python benchmarks/_reliability_names.py

Each program makes up a name for one prompt, takes it and writes a file under it, as `wanduet generate` does without the
models.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
from wanduet.media.files import write_atomically
from wanduet.media.names import names_for, take
sys.stdin.read(1)  # all begin together
for path in names_for(Path(sys.argv[1]), "a red circle"):
    if path.exists() or (names := take([path])) is None:
        continue
    if not path.exists():
        break
    names.release()
write_atomically(path, sys.argv[2].encode())
names.release()
"""


def lost_names(programs: int, rounds: int) -> dict[str, float]:
    """Outputs of `rounds` rounds of `programs` programs, how many of them are lost, and the seconds a round took."""
    written = lost = 0
    began = time.perf_counter()
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            started = [
                subprocess.Popen([sys.executable, "-c", PROGRAM, folder, str(number)], stdin=subprocess.PIPE)
                for number in range(programs)
            ]
            for process in started:
                assert process.stdin is not None
                process.stdin.write(b"x")
                process.stdin.close()
            for process in started:
                assert process.wait() == 0
            found = {path.read_text() for path in Path(folder).glob("*.mp4")}
            written += programs
            lost += programs - len(found)
    return {"outputs": written, "lost": lost, "seconds_per_round": round((time.perf_counter() - began) / rounds, 2)}


if __name__ == "__main__":
    print(json.dumps(lost_names(programs=8, rounds=5)))
