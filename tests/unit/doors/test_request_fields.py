"""A field is added to a request in one place: the flags, the server's body, the page's form and the docs follow."""

import importlib.util
import inspect
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import wanduet.request
from wanduet.errors import InvalidRequestError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.request import REQUEST_FIELDS, GenerationRequest
from wanduet.request_fields import RequestField

# One field of each kind, as they would stand in request.py.
MORE = """
    novelty: Annotated[Real | None, Shown(label="Force", aliases=("--force",), limit="videos")] = Field(
        default=None, ge=0, le=1, description="How much of the noise is new."
    )
    overlap: Annotated[Whole, Shown(limit="videos")] = Field(default=2, ge=1, le=8, description="Rows shared by tiles.")
    look: Literal["plain", "film"] = Field(default="plain", description="The grain of the picture.")
    tiled: bool = Field(default=False, description="Denoise in tiles.")
    style: str | None = Field(default=None, description="Words for every prompt.")
    marks: Annotated[Timesteps | None, Shown(label="Key frames", replaces=("overlap",))] = Field(
        default=None, description="Where frames are kept."
    )
    mask: Annotated[str | None, Shown(is_file=True, detail="")] = Field(
        default=None, min_length=1, description="A video of what stays."
    )
    feather: Annotated[Real | None, Shown(span=(0, 8), step=0.5, start=2, needs="mask")] = Field(
        default=None, ge=0, le=64, description="How soft the mask's border is. In pixels."
    )
"""
NEW = ("novelty", "overlap", "look", "tiled", "style")
VALUES = {"novelty": 0.5, "overlap": 3, "look": "film", "tiled": True, "style": "in oil"}
LISTED, LIST = "900,2.5", (900.0, 2.5)  # of `marks`, which replaces `overlap`


@pytest.fixture
def changed() -> Iterator[ModuleType]:
    """`wanduet.request` with the fields above, which all doors that are imported in the test are made from."""
    marker = "    @classmethod\n    def parse("
    source = inspect.getsource(wanduet.request)
    assert source.count(marker) == 1
    module = ModuleType("wanduet.request")
    before = {name: one for name, one in sys.modules.items() if name.partition(".")[0] == "wanduet"}
    for name in before:
        if name.startswith("wanduet.doors"):
            del sys.modules[name]
    sys.modules["wanduet.request"] = module
    try:
        exec(compile(source.replace(marker, f"{MORE}\n{marker}"), "request.py", "exec"), module.__dict__)
        yield module
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "wanduet"]:
            del sys.modules[name]
        sys.modules.update(before)
        for name, one in before.items():  # imports have set them in the package that they are in
            package, _, last = name.rpartition(".")
            if package:
                setattr(before[package], last, one)


def test_a_new_field_is_a_flag_with_its_help(changed: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanduet.doors.cli.main import app

    monkeypatch.setattr(sys, "argv", ["wanduet"])
    reference = app.generate_docs(output_format="markdown", recursive=True)
    for flags, words in (
        ("--novelty, --force FLOAT", "How much of the noise is new."),
        ("--overlap INT", "Rows shared by tiles."),
        ("--look CHOICE", "The grain of the picture. *[choices: plain, film]*"),
        ("--tiled, --no-tiled", "Denoise in tiles."),
        ("--style STR", "Words for every prompt."),
        ("--marks STR", "Where frames are kept."),
        ("--mask STR", "A video of what stays."),
    ):
        assert f"* `{flags}`: {words}" in reference


def test_what_is_typed_for_a_new_field_is_in_the_request(changed: ModuleType, tmp_path: Path) -> None:
    from wanduet.config import EngineConfig
    from wanduet.doors.cli.main import app
    from wanduet.doors.cli.validate import read_batch

    typed = ["--force", "0.5", "--overlap", "3", "--look", "film", "--tiled", "--style", "in oil"]
    _, bound, _ = app.parse_args(["generate", "x", *typed], exit_on_error=False, print_error=False)
    request = bound.arguments["video"].request("x")
    assert {name: getattr(request, name) for name in NEW} == VALUES
    assert bound.arguments["video"].request("x").model_fields_set == {"prompt", *NEW}
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a", "novelty": 0.25}\n{"prompt": "b"}\n')
    first, second = read_batch(file, bound.arguments["video"], EngineConfig(model="random:1.3b"))
    assert (first.novelty, second.novelty, first.look) == (0.25, 0.5, "film")  # type: ignore[attr-defined]
    file.write_text('{"prompt": "a", "marks": [900, 2.5]}\n{"prompt": "b", "marks": "900,2.5"}\n{"prompt": "c"}\n')
    made = read_batch(file, bound.arguments["video"], EngineConfig(model="random:1.3b"))
    lists = [(one.marks, one.overlap) for one in made]  # type: ignore[attr-defined]
    assert lists == [(LIST, 2), (LIST, 2), (None, 3)], "a line's field replaces the flag"
    assert replace(bound.arguments["video"], marks=LISTED).request("x").marks == LIST
    with pytest.raises(InvalidRequestError, match="at most 1"):
        replace(bound.arguments["video"], novelty=2).request("x")


def test_a_new_field_is_in_the_servers_body(changed: ModuleType) -> None:
    from wanduet.doors.http.schemas import CreateVideo, RequestLimits, to_request

    properties = CreateVideo.model_json_schema()["properties"]
    kinds = {name: {one["type"] for one in properties[name]["anyOf"]} - {"null"} for name in NEW}
    assert kinds == {
        "novelty": {"number"}, "overlap": {"integer"}, "look": {"string"}, "tiled": {"boolean"}, "style": {"string"},
    }  # fmt: skip
    in_a_form = {name: str(value) for name, value in VALUES.items()}
    for body in (VALUES, in_a_form):
        request = to_request({"prompt": "x", **body}, WAN_1_3B, RequestLimits())
        assert {name: getattr(request, name) for name in NEW} == VALUES
    assert to_request({"prompt": "x"}, WAN_1_3B, RequestLimits()).novelty is None  # type: ignore[attr-defined]
    assert {one["type"] for one in properties["marks"]["anyOf"]} == {"array", "string", "null"}
    for given in (LISTED, list(LIST)):
        marked = to_request({"prompt": "x", "marks": given}, WAN_1_3B, RequestLimits())
        assert marked.marks == LIST  # type: ignore[attr-defined]
    for field, words in (
        ({"novelty": "much"}, "novelty='much' is not allowed: a number"),
        ({"overlap": 5}, "this server takes at most 4"),
        ({"marks": [1, 2]}, "marks=[1, 2] is not allowed: each must be less than the one before"),
        ({"look": "odd"}, "one of 'plain' or 'film'"),
        ({"style": "\0"}, "Unicode"),
    ):
        with pytest.raises(InvalidRequestError) as refused:
            to_request({"prompt": "x", **field}, WAN_1_3B, RequestLimits())
        assert words in str(refused.value)


def test_a_new_field_is_in_the_pages_form(changed: ModuleType) -> None:
    from wanduet.doors.http.schemas import RequestLimits
    from wanduet.doors.page.forms import FORM_FIELDS, default_form, describe, form_rows

    start, limits = default_form(WAN_1_3B.defaults), RequestLimits()
    parts = {name: describe(FORM_FIELDS[name], start[name], limits) for row in form_rows() for name in row}
    assert {parts[name]["label"]: parts[name]["kind"] for name in NEW} == {
        "Force": "short", "Overlap": "number", "Look": "choice", "Tiled": "switch", "Style": "text",
    }  # fmt: skip
    assert (parts["marks"]["kind"], parts["marks"]["replaces"]) == ("short", ["overlap"])
    assert [parts["overlap"][name] for name in ("min", "max")] == [1, 4]
    assert (parts["look"]["choices"], parts["look"]["help"]) == (["plain", "film"], "The grain of the picture.")


def test_what_is_chosen_for_a_new_field_on_the_page_is_in_the_job_and_shown_with_it(changed: ModuleType) -> None:
    from wanduet.doors.http.schemas import RequestLimits, to_request
    from wanduet.doors.page import words
    from wanduet.doors.page.forms import default_form, fields_of, form_of
    from wanduet.jobs.records import StoredJob

    defaults = default_form(WAN_1_3B.defaults)
    assert {name: defaults[name] for name in NEW} == {
        "novelty": "", "overlap": 2, "look": "plain", "tiled": False, "style": "",
    }  # fmt: skip
    form = {**defaults, "prompt": "x", **VALUES, "novelty": "0.5", "overlap": 3.0}
    request = to_request(fields_of(form), WAN_1_3B, RequestLimits()).model_dump()
    assert {name: request[name] for name in NEW} == VALUES
    assert form_of(request, defaults) == {**form, "seed": str(request["seed"])}
    listed = {**form, "marks": LISTED}
    assert "overlap" not in fields_of(listed), "it is replaced"
    marked = to_request(fields_of(listed), WAN_1_3B, RequestLimits()).model_dump()
    assert form_of(marked, defaults)["marks"] == LISTED
    assert form_of(request, {**defaults, "marks": LISTED})["marks"] == "", "the model's default was not used"

    def rows(values: dict[str, object]) -> dict[str, str]:
        return dict(words.card(StoredJob("video_" + "0" * 32, "local", "m", values, "completed"))["rows"])

    assert rows(marked)["Key frames"] == "900, 2.5"
    assert {name: rows(request)[name] for name in ("Force", "Look", "Tiled")} == {
        "Force": "0.5", "Look": "film", "Tiled": "on",
    }  # fmt: skip
    assert "Force" not in rows({name: value for name, value in request.items() if name not in NEW})
    with pytest.raises(InvalidRequestError) as refused:
        to_request(fields_of({**form, "novelty": "7"}), WAN_1_3B, RequestLimits())
    answer = words.refusal(refused.value, form)
    assert answer["text"] == "Force: 7 does not work, 1 does."
    assert answer["fixes"] == [{"text": "Use force 1", "set": {"novelty": 1}}]


def test_a_new_file_is_a_part_of_the_servers_form_and_no_field_of_its_json(changed: ModuleType) -> None:
    from wanduet.doors.http.schemas import CreateVideo, form_schema, json_schema

    part = form_schema(CreateVideo)["properties"]["mask"]
    assert (part["type"], part["format"]) == ("string", "binary")
    assert "mask" not in json_schema(CreateVideo)["properties"]


def test_a_new_file_is_uploaded_on_the_page_and_what_needs_it_goes_with_it(changed: ModuleType) -> None:
    from wanduet.doors.http.schemas import RequestLimits
    from wanduet.doors.page import words
    from wanduet.doors.page.clips import Clip
    from wanduet.doors.page.forms import (
        FILE_FIELDS,
        FORM_FIELDS,
        clips_of,
        default_form,
        describe,
        fields_of,
        form_of,
        form_rows,
    )
    from wanduet.jobs.records import StoredJob

    start = default_form(WAN_1_3B.defaults)
    assert FILE_FIELDS == ("input_video", "mask")
    assert {"mask", "feather"}.isdisjoint(name for row in form_rows() for name in row), "they are no settings"
    slider = describe(FORM_FIELDS["feather"], start["feather"], RequestLimits())
    assert [slider[name] for name in ("kind", "min", "max", "needs")] == ["number", 0, 8, "mask"]
    assert start["feather"] == 2
    assert describe(FORM_FIELDS["mask"], start["mask"], RequestLimits())["kind"] == "file", "not a text box"
    form = {**start, "prompt": "x", "mask": Clip("mask.mp4")}
    assert (clips_of(start), clips_of(form)) == ({}, {"mask": form["mask"]})
    assert "feather" not in fields_of(start)
    assert fields_of(form)["feather"] == 2
    assert "mask" not in fields_of(form), "the browser sends it"
    request = {"prompt": "x", "mask": "sha256:0", "feather": 3.5}
    assert form_of(request, start)["mask"] is None, "a file is not taken from its name"
    rows = dict(words.card(StoredJob("video_" + "0" * 32, "local", "m", request, "completed"))["rows"])
    assert (rows["Feather"], rows["Made from"]) == ("3.5", "a mask")


def test_a_new_field_is_in_the_docs(changed: ModuleType) -> None:
    path = Path(__file__).parents[3] / "docs" / "make.py"
    spec = importlib.util.spec_from_file_location("docs_make_of_fields", path)
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    table = make.with_field_table("<!-- fields -->\n<!-- /fields -->\n")
    assert "| `novelty` | a number, at least 0, at most 1 | How much of the noise is new. |" in table
    assert "| `look` | one of plain, film | The grain of the picture. |" in table
    assert "| `marks` | a list of numbers | Where frames are kept. |" in table


@pytest.mark.parametrize("field", REQUEST_FIELDS.values(), ids=lambda field: field.name)
def test_what_the_page_and_the_server_let_through_is_allowed(field: RequestField) -> None:
    from wanduet.doors.http.schemas import RequestLimits
    from wanduet.doors.page.forms import FORM_FIELDS, default_form, describe

    assert field.help.endswith(".")
    limits = RequestLimits()
    values = [limits.of(field)]
    if field.name in FORM_FIELDS:
        about = describe(field, default_form(WAN_1_3B.defaults)[field.name], limits)
        values += [about.get("min"), about.get("max"), *about.get("choices", ())]
    for value in values:
        if value is not None:
            assert getattr(GenerationRequest.parse(**{"prompt": "x", field.name: value}), field.name) == value
