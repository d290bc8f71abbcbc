"""What `deploy/one-machine` names exists: flags, variables, routes, ports, files; and its parts agree with each other."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from wanduet import __version__
from wanduet.config import parse_bytes
from wanduet.doors.cli.jobs import ServerFlags
from wanduet.doors.cli.main import app
from wanduet.doors.http.context import ServerSettings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "one-machine"
UNIT = (FOLDER / "wanduet.service").read_text()
README = (FOLDER / "README.md").read_text()
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def image() -> ModuleType:
    spec = importlib.util.spec_from_file_location("try_image", FOLDER / "try_image.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calls(image: ModuleType) -> list[list[str]]:
    """The arguments of every call of wanduet."""
    found = [image.command(DOCKERFILE)[1:], *(COMPOSE["services"][name]["command"] for name in ("wanduet", "fetch"))]
    for text in (UNIT, README):
        found += [shlex.split(one) for one in re.findall(r"(?:bin/wanduet|--rm wanduet) ([^#'\n]+)", text)]
    return found


def test_every_call_parses(image: ModuleType) -> None:
    found = calls(image)
    assert {"serve", "download", "keys"} <= {arguments[0] for arguments in found}
    assert len(found) >= 7
    for arguments in found:
        app.parse_args([one.replace("${SITE:?the name of this server}", "x") for one in arguments],
                       exit_on_error=False, print_error=False)  # fmt: skip


def test_every_variable_of_ours_is_a_flag() -> None:
    names = set()
    for path in filter(Path.is_file, FOLDER.iterdir()):
        names |= set(re.findall(r"\bWANDUET_[A-Z_]+", path.read_text()))
    flags = subprocess.run(
        [sys.executable, "-m", "wanduet", "serve", "--help"], capture_output=True, text=True, check=True
    )
    assert {"WANDUET_DATA_DIR", "WANDUET_MODEL", "WANDUET_ALLOWED_HOST"} <= names
    for name in names:
        assert f"--{name.removeprefix('WANDUET_').lower().replace('_', '-')}" in flags.stdout


def test_the_dockerfiles_steps_are_there_and_its_packages_have_hashes(image: ModuleType) -> None:
    script = [sys.executable, str(FOLDER / "try_image.py"), "--dry"]
    shown = subprocess.run(script, capture_output=True, text=True, check=True, cwd=ROOT.parent).stdout
    assert "--require-hashes -r requirements-hashed.txt" in shown
    assert "wanduet serve" in shown
    for kind, words in image.steps(DOCKERFILE):
        assert kind != "pip" or "--require-hashes" in words or {"--no-deps", "--no-build-isolation"} <= set(words)
    kept = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    for kind, words in image.steps(DOCKERFILE):
        assert kind != "copy" or {f"!{word}" for word in words} <= set(kept)
    with pytest.raises(SystemExit, match="no such-file"):
        image.steps("COPY src such-file ./")


def test_the_image_is_not_root_and_has_its_volumes(image: ModuleType) -> None:
    given = dict(image.instructions(DOCKERFILE))
    assert given["USER"] == "wanduet"
    service = COMPOSE["services"]["wanduet"]
    mounted = {one.partition(":")[2] for one in service["volumes"]}
    assert mounted == set(json.loads(given["VOLUME"]))
    assert all(one.partition(":")[0] in COMPOSE["volumes"] for one in service["volumes"])
    assert service["image"] == f"wanduet:{__version__}"
    assert COMPOSE["networks"]["inside"]["internal"] is True
    assert service["networks"] == ["inside"]


def test_ports_agree(image: ModuleType) -> None:
    port = str(ServerFlags().port)
    assert dict(image.instructions(DOCKERFILE))["EXPOSE"] == port
    for arguments in calls(image):
        assert "--port" not in arguments or arguments[arguments.index("--port") + 1] == port
    assert COMPOSE["services"]["proxy"]["environment"]["UPSTREAM"] == f"wanduet:{port}"
    assert f"127.0.0.1:{port}}}" in (FOLDER / "Caddyfile").read_text()
    upstreams = re.findall(r"proxy_pass http://127\.0\.0\.1:(\d+);", (FOLDER / "nginx.conf").read_text())
    assert set(upstreams) == {port}


def test_routes_exist(image: ModuleType, tmp_path: Path) -> None:
    from wanduet.doors.http.server import create_app
    from wanduet.family.wan21 import WAN_1_3B
    from wanduet.jobs.files import JobFiles
    from wanduet.jobs.store import JobStore

    store = JobStore(JobFiles(tmp_path))
    paths = set(create_app(store, WAN_1_3B).openapi()["paths"])
    store.close()
    named = set(re.findall(r"https://\$SITE(/[\w/]+)", README)) | {"/ready"}
    assert "/v1/videos/ID/content" in named
    assert {path.replace("ID", "{video_id}") for path in named} <= paths
    assert f":{ServerFlags().port}/ready" in " ".join(image.health_check(DOCKERFILE))
    (events,) = re.findall(r"location ~ (\S+) {", (FOLDER / "nginx.conf").read_text())
    assert [path for path in paths if re.search(events, path)] == ["/v1/videos/{video_id}/events"]


def test_proxies_take_what_the_server_takes() -> None:
    settings = ServerSettings()
    needed = parse_bytes(ServerFlags().max_input_video) + settings.max_body_bytes
    (caddy,) = re.findall(r"max_size (\S+)", (FOLDER / "Caddyfile").read_text())
    (nginx,) = re.findall(r"client_max_body_size (\d+)m;", (FOLDER / "nginx.conf").read_text())
    assert needed <= parse_bytes(caddy)
    assert needed <= int(nginx) * 2**20


def test_the_unit_leaves_gpus_usable() -> None:
    settings = dict(line.split("=", 1) for line in UNIT.splitlines() if re.match(r"\w+=", line))
    assert settings["ProtectSystem"] == "strict"
    # ProtectClock, too, allows one device only before systemd 253: its clock.
    assert not settings.keys() & {
        "PrivateDevices",
        "DeviceAllow",
        "DevicePolicy",
        "ProtectClock",
        "MemoryDenyWriteExecute",
    }
    assert re.search(
        r"^ExecStartPre=-\+.*nvidia-modprobe", UNIT, re.MULTILINE
    )  # NoNewPrivileges leaves its own call no rights


def test_the_unit_reads_flags_from_where_the_readme_writes_them() -> None:
    (path,) = re.findall(r"^EnvironmentFile=(\S+)$", UNIT, re.MULTILINE)
    assert f"> {path}" in README
    (state,) = re.findall(r"^StateDirectory=(\S+)$", UNIT, re.MULTILINE)
    assert f"--data-dir /var/lib/{state}\n" in UNIT
