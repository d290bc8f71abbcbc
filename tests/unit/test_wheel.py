"""What the wheel holds: the package with the miniatures' weights, nothing of `tools/`, `tests/` or `benchmarks/`."""

import json
from pathlib import Path

import pytest
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "wanduet"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The paths in the wheel, listed by the command that would copy them there."""
    monkeypatch.chdir(ROOT)
    build = apply_configuration(Distribution({"script_name": "setup.py"}), "pyproject.toml").get_command_obj("build_py")
    build.ensure_finalized()
    folder = Path(build.build_lib)
    return {Path(path).relative_to(folder).as_posix() for path in build.get_outputs(include_bytecode=False)}


def test_the_wheel_is_the_package(files: set[str]) -> None:
    modules = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == modules
    assert "wanduet/py.typed" in files


def test_the_wheel_has_the_pages_files(files: set[str]) -> None:
    static = PACKAGE / "doors" / "page" / "static"
    expected = {path.relative_to(PACKAGE.parent).as_posix() for path in static.iterdir()}
    assert {name for name in files if "/static/" in name} == expected
    assert "wanduet/doors/page/static/index.html" in expected


def test_of_the_miniature_the_wheel_has_weights_and_vocabulary_alone(files: set[str]) -> None:
    lora = {f"lora/{name}" for name in ("README.md", "ring.safetensors", "training.json")}
    expected = {"__init__.py", "vocabulary.py"} | lora
    for model in ("model", "fast"):
        hashes = json.loads((PACKAGE / "miniature" / model / "manifest.json").read_text())["sha256"]
        expected |= {f"{model}/{name}" for name in (*hashes, "manifest.json")}
    assert {name.removeprefix("wanduet/miniature/") for name in files if "miniature" in name} == expected
