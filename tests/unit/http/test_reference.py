"""The page that lists what the API takes."""

import re
from html.parser import HTMLParser
from typing import Any

from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.reference import POLICY, render
from wanduet.request import REQUEST_FIELDS


class Page(HTMLParser):
    """Ids, links, tags and the text of a page; raises for a tag that is closed but not open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values["href"] or ""] if "href" in values else []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_call_and_field_is_on_the_page_and_every_link_leads_somewhere(api: Any) -> None:
    answer = api.http.get("/docs")
    page = Page(answer.text)
    for path, methods in api.app.openapi()["paths"].items():
        assert all(f"{method.upper()} {path}" in page.text for method in methods)
    assert all(name in page.text for name in (*REQUEST_FIELDS, "webhook_url", "Idempotency-Key", "waits_for"))
    assert {link for link in page.links if link.startswith("#")} <= {f"#{name}" for name in page.ids}
    assert len(page.ids) == len(set(page.ids))
    assert {link for link in page.links if not link.startswith("#")} == {"/openapi.json"}


def test_it_loads_nothing_and_runs_no_script(api: Any) -> None:
    answer = api.http.get("/docs")
    page = Page(answer.text)
    assert not {"script", "img", "link", "iframe", "form"} & set(page.tags)
    assert not re.search(r"\son\w+=|style=", answer.text)
    assert answer.headers["content-security-policy"] == POLICY
    assert POLICY.startswith("default-src 'none'; style-src 'sha256-")


def test_texts_of_the_schema_are_no_html() -> None:
    field = {"type": "string", "description": "<b>`a<b`", "default": "<i>"}
    schema = {
        "info": {"title": "<s>", "version": "1"},
        "paths": {},
        "components": {"schemas": {"<x>": {"description": "<u>", "properties": {"<y>": field}}}},
    }
    assert not {"b", "i", "s", "u", "x", "y"} & set(Page(render(schema)).tags)


def test_it_needs_a_key_where_the_rest_does(make_api: Any) -> None:
    api = make_api(ServerSettings(host="0.0.0.0"))
    for accept in ("*/*", "text/html"):  # there is no page to sign in
        assert api.http.get("/docs", headers={"Accept": accept}).status_code == 401
    key = api.context.keys.add("anna")
    assert api.http.get("/docs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
