"""README and docs say what is so: commands parse, flags exist, links lead somewhere, tables are what the code predicts."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "wanduet"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("[CS]*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# Flags of other programs that the pages name.
FOREIGN = {"--torch-backend", "--network", "--ipc", "--gpus", "--head", "--address", "--num-gpus", "--labels", "--port",
           "--from-literal", "--no-deps", "--require-hashes", "--include-dashboard", "--node-ip-address", "--durations"}  # fmt: skip


@pytest.fixture(scope="module")
def make() -> ModuleType:
    """docs/make.py, which writes what is compared here."""
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_lines(text: str) -> list[str]:
    """Lines of fenced and of indented blocks; what a line goes on with is joined to it."""
    fenced = re.findall(r"^```(?:sh|powershell|console|bash)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(
        r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    lines = "\n".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines]


def commands(page: Path) -> list[list[str]]:
    """Arguments of each call of ours that a page shows; `run_wan.py` is `generate` with a prompt of its own."""
    found = []
    for line in code_lines(page.read_text()):
        for part in re.split(r"&&|\|", re.sub(r"\s+#\s.*", "", line)):
            words = shlex.split(part.replace("\\", "/"))
            if words and words[0].endswith("wanduet"):
                found.append(words[1:])
            elif len(words) > 1 and words[1] == "run_wan.py":
                found.append(["generate", *(words[2:] or ["a prompt"])])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_command_that_is_shown_parses(name: str) -> None:
    from wanduet.doors.cli.main import app

    for arguments in commands(ROOT / name):
        if not re.search(r"[\[\]]|COMMAND", " ".join(arguments)):  # a synopsis
            app.parse_args(arguments, exit_on_error=False, print_error=False)


def test_commands_are_found_where_they_are_shown() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 30


@pytest.fixture(scope="module")
def known_flags(make: ModuleType) -> set[str]:
    return set(re.findall(r"--[a-z][\w-]*", make.command_line())) | FOREIGN


@pytest.mark.parametrize("name", [name for name in NAMES if name != "docs/cli.md"])
def test_every_flag_that_is_named_exists(name: str, known_flags: set[str]) -> None:
    text = re.sub(r"\]\([^)]*\)", "", (ROOT / name).read_text())
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert named <= known_flags


@pytest.mark.parametrize("name", NAMES)
def test_nothing_says_to_install_from_an_index_what_is_on_none(name: str) -> None:
    """The project's name is free for anybody there."""
    assert not re.findall(r"pip install [^\n]*\bwanduet\b(?!/)", (ROOT / name).read_text())


@pytest.mark.parametrize("name", NAMES)
def test_links_and_pictures_are_there(name: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        if anchor and page.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_the_map_of_the_code_names_what_exists() -> None:
    text = "".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in ("architecture.md", "where.md"))
    paths = {path for path in re.findall(r"`([\w./-]+)`", text) if "/" in path or path.endswith(".py")}
    assert len(paths) > 40
    assert [path for path in sorted(paths) if not any((top / path).exists() for top in (PACKAGE, ROOT))] == []


def test_the_map_of_the_code_has_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = set(re.findall(r"\w+", text.split("## The rooms")[1].split("```")[1]))
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(parts) > 15
    assert parts - {"__init__", "__main__"} - rooms == set()


def test_the_reference_of_the_command_line_is_up_to_date(make: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["wanduet"])  # in which cyclopts looks for the program's name
    assert (ROOT / "docs" / "cli.md").read_text() == make.command_line(), "make docs"


def test_the_table_of_cards_is_what_the_cost_model_says(make: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    assert len(re.findall(r"^\| (?:\d × )?(?:RTX|A100|H100)", readme, re.MULTILINE)) >= 8
    assert make.with_card_table(readme) == readme, "make docs"


def test_the_tables_of_files_are_what_plans_and_messages_say(make: ModuleType) -> None:
    models = (ROOT / "docs" / "models.md").read_text()
    assert models.count("| 24 GiB | 14B |") == 2
    assert "which wanduet does not have | Take the weights of Wan2.1 T2V" in models
    assert make.with_model_tables(models) == models, "make docs"


def test_the_table_of_fields_is_the_requests(make: ModuleType) -> None:
    server = (ROOT / "docs" / "server.md").read_text()
    assert "| `num_inference_steps` | a whole number, at least 1, at most 1,000 |" in server
    assert make.with_field_table(server) == server, "make docs"


@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_example_batches_are_read(ending: str) -> None:
    from wanduet.config import EngineConfig
    from wanduet.doors.cli.options import VideoFlags
    from wanduet.doors.cli.validate import read_batch

    file = ROOT / "examples" / f"prompts.{ending}"
    assert len(read_batch(file, VideoFlags(), EngineConfig(model="miniature"))) == 3


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_use_what_there_is(path: Path) -> None:
    import ast

    import wanduet

    tree = ast.parse(path.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "wanduet"]
    for name in (alias.name for node in imports for alias in node.names):
        assert hasattr(wanduet, name)
