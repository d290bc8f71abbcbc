"""The reference page of the API, made of its OpenAPI schema: one HTML page without scripts, that loads nothing."""

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

Schema = Mapping[str, Any]

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c1917;background:#fafaf9}
h2{margin:3rem 0 .5rem;padding-top:1rem;border-top:1px solid #d6d3d1;font-size:1.2rem}h3{margin:1.2rem 0 .3rem;font-size:1rem}
code,pre{font:.9em ui-monospace,monospace}pre{padding:.8rem;overflow:auto;background:#f0efed;border-radius:8px}
.table{overflow-x:auto}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #e7e5e4}
td:first-child{white-space:nowrap}nav ul{columns:18rem;padding-left:1.2rem}a{color:#1d4ed8}
@media(prefers-color-scheme:dark){body{color:#e7e5e4;background:#1c1917}pre{background:#292524}a{color:#93c5fd}
h2,th,td{border-color:#44403c}}
"""
POLICY = (
    f"default-src 'none'; style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head><body><main>
<h1>{title}</h1><p>The OpenAI videos protocol, with the engine's own settings as further fields. The same as a schema:
<a href="/openapi.json">openapi.json</a>. Where this server needs a key, each call has it in a header:</p>
<pre>curl -s $URL/v1/videos -H 'Authorization: Bearer KEY' -F prompt='a red circle'</pre>
"""


def render(schema: Schema) -> str:
    """Return the page of an OpenAPI schema."""
    info = schema["info"]
    title = escape(f"{info['title']} {info['version']}: reference of the API")
    calls = [
        (method.upper(), path, call) for path, methods in schema["paths"].items() for method, call in methods.items()
    ]
    models = schema.get("components", {}).get("schemas", {})
    parts = [_HEAD.format(title=title, style=_STYLE), "<nav><ul>"]
    parts += [f'<li><a href="#{_anchor(method, path)}">{method} {escape(path)}</a>' for method, path, _ in calls]
    parts.append("</ul></nav>")
    for call in calls:
        parts += _call(*call)
    for name, model in models.items():
        parts.append(f'<h2 id="{escape(name)}">{escape(name)}</h2>{_text(model.get("description"))}')
        parts.append(_fields(model))
    return "\n".join([*parts, "</main></body></html>"])


def _anchor(method: str, path: str) -> str:
    return re.sub(r"\W+", "-", f"{method}{path}").strip("-").lower()


def _call(method: str, path: str, call: Schema) -> Iterator[str]:
    yield f'<h2 id="{_anchor(method, path)}"><code>{method} {escape(path)}</code></h2>{_text(call.get("description"))}'
    if parameters := call.get("parameters"):
        rows = [
            (one["name"], _type(one["schema"]), one["in"] + (", needed" if one.get("required") else ""), _about(one))
            for one in parameters
        ]
        yield "<h3>Parameters</h3>" + _table(("name", "takes", "in", ""), rows)
    for kind, content in call.get("requestBody", {}).get("content", {}).items():
        yield f"<h3>Body, <code>{escape(kind)}</code></h3>{_fields(content['schema'])}"
    answers = []
    for status, answer in call["responses"].items():
        kinds = [
            f"{_type(content['schema'])}" if "schema" in content else escape(kind)
            for kind, content in answer.get("content", {}).items()
        ]
        answers.append((status, ", ".join(kinds), escape(answer.get("description", ""))))
    yield "<h3>Answers</h3>" + _table(("status", "holds", ""), answers)


def _fields(model: Schema) -> str:
    needed = model.get("required", ())
    rows = [
        (name, _type(field), "needed" if name in needed else "", _about(field))
        for name, field in model.get("properties", {}).items()
    ]
    return _table(("field", "takes", "", ""), rows) if rows else f"<p>{_type(model)}</p>"


def _about(field: Schema) -> str:
    """Return a description and the default, as HTML."""
    schema = field.get("schema", field)
    parts = [_prose(field.get("description", ""))]
    if schema.get("default") is not None:
        parts.append(f"Default: <code>{escape(str(schema['default']))}</code>.")
    return " ".join(part for part in parts if part)


def _type(schema: Schema) -> str:
    """Return what a value is, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(one))}</code>" for one in schema["enum"])
    if "const" in schema:
        return f"<code>{escape(str(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    limits = [
        f"{word} {schema[name]}"
        for name, word in (("minimum", "from"), ("maximum", "to"), ("maxLength", "with at most so many characters:"))
        if name in schema
    ]
    kind = "file" if schema.get("format") == "binary" else str(schema.get("type", "anything"))
    return escape(" ".join([kind, *limits]))


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table; the first cell of a row is plain text, the others are HTML."""
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(
        f"<tr><td><code>{escape(row[0])}</code></td>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="table"><table><tr>{heads}</tr>{lines}</table></div>'


def _text(text: str | None) -> str:
    return f"<p>{_prose(text)}</p>" if text else ""


def _prose(text: str) -> str:
    """Return a description as HTML; what is between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
