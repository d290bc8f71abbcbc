"""Writes docs/cli.md, the command line's reference, from the commands themselves, README's table of cards, and the table of
a request's fields in docs/server.md."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SIZES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1080, 1920)}
CARDS = (
    "RTX 3060", "RTX 4060 Ti", "RTX 4070", "RTX 3090", "2xRTX 3090", "RTX 4090", "2xRTX 4090", "RTX 5090", "A100",
)  # fmt: skip
# Whole jobs as measured: files in benchmarks/results, by size.
MEASURED = {"H100": ("whole_job_480p", "whole_job_720p", "whole_job_1080p")}


def command_line() -> str:
    """The reference. Flags that several commands share are listed once, by the first."""
    from wanduet.doors.cli.help import EVERYWHERE
    from wanduet.doors.cli.main import app

    text = app.generate_docs(output_format="markdown", recursive=True)
    text = re.sub(r" \*\[env: \w+\]\*", "", text)  # EVERYWHERE says how they are named
    text = text.replace("(#wanduet-install", "(#wanduet---install")  # as GitHub derives it from the title
    text = text.replace("## Table of Contents", f"{EVERYWHERE}\n\n## Table of Contents", 1)
    listed: dict[str, str] = {}  # group and flags to the command that lists them
    commands = re.split(r"(?m)^(?=## )", text)
    return "".join(_once(command, listed) for command in commands)


def _once(command: str, listed: dict[str, str]) -> str:
    name = command.partition("\n")[0].removeprefix("## ")

    def shorten(found: re.Match[str]) -> str:
        first = listed.setdefault(found[0].strip(), name)
        if first == name:
            return found[0]
        return f"**{found[1]}**: those of [`{first}`](#{first.replace(' ', '-')}).\n"

    return re.sub(r"\*\*(Video|Speed, at a loss|Model|Engine|Server|Cluster)\*\*:\n\n(?:\* .*\n)+", shorten, command)


def with_card_table(readme: str) -> str:
    """README with its table of cards made anew."""
    return _with_table(readme, "cards", _rows())


def with_field_table(server: str) -> str:
    """docs/server.md with its table of a request's fields made anew."""
    return _with_table(server, "fields", _field_rows())


def _with_table(page: str, name: str, rows: Iterator[str]) -> str:
    table = "\n".join(rows)
    marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(marks, lambda m: f"{m[1]}{table}\n{m[2]}", page, flags=re.DOTALL)


def _field_rows() -> Iterator[str]:
    from wanduet.request import REQUEST_FIELDS
    from wanduet.request_fields import LIMITS

    yield "| field | takes | |"
    yield "|---|---|---|"
    for name, field in REQUEST_FIELDS.items():
        if not field.is_required:
            limits = [
                f"{LIMITS[key]} {limit:{',' if field.kind is int else 'g'}}" for key, limit in field.limits.items()
            ]
            takes = ", ".join([field.takes, *limits])
            yield f"| `{name}` | {takes} | {field.help} |"


def _rows() -> Iterator[str]:
    from wanduet.config import EngineConfig
    from wanduet.planning.hardware import parse_hardware
    from wanduet.planning.planner import make_plan
    from wanduet.request import GenerationRequest
    from wanduet.runtime.models import Models

    config = EngineConfig(model="random:1.3b")
    models = Models(config)

    def minutes(hardware: str, height: int, width: int) -> str:
        request = GenerationRequest(prompt="any", height=height, width=width, num_frames=81).resolve(models.spec)
        plan = make_plan(request, models.memory, config, parse_hardware(f"{hardware},ram=32GiB"))
        assert plan.prediction.fits
        return _minutes(plan.prediction.seconds.total)

    yield "| card | " + " | ".join(SIZES) + " |"
    yield "|---|" + "---|" * len(SIZES)
    for hardware in CARDS:
        name = hardware.replace("2x", "2 × ")
        yield f"| {name} | " + " | ".join(minutes(hardware, *size) for size in SIZES.values()) + " |"
    for name, files in MEASURED.items():
        yield f"| {name} | " + " | ".join(f"**{_minutes(_measured(file))}**" for file in files) + " |"


def _minutes(seconds: float) -> str:
    """Two digits are all that a prediction is good for."""
    minutes = seconds / 60
    return f"{minutes:.1f}" if minutes < 10 else f"{minutes:.0f}"


def _measured(file: str) -> float:
    """Seconds of a job of 50 steps, from a run that may have made fewer: steps are alike."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())["sections"]["ours"]
    run = next(one for one in found if one["run"] == "whole")
    return 50 * float(run["step_s"]) + float(run["decode_s"]) + float(run["write_s"])


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(command_line())
    for page, renewed in ((ROOT / "README.md", with_card_table), (ROOT / "docs" / "server.md", with_field_table)):
        page.write_text(renewed(page.read_text()))
