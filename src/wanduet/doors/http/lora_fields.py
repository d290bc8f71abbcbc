"""How clients spell LoRA in a request: `loras`, and what vLLM-Omni and LightX2V send. All become `loras` as `Lora` has them."""

import re
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from wanduet.errors import InvalidRequestError
from wanduet.loras import MOST_LORAS, Lora
from wanduet.request_fields import explain
from wanduet.untrusted import cut, parse_json

NAMES = ("loras", "lora", "lora_name")  # fields that name LoRA; a request has one of them
STRENGTHS = ("lora_strength", "lora_scale")  # beside `lora_name`
PATHS = ("lora_path",)
SPELLINGS = (*NAMES, *STRENGTHS, *PATHS)
NO_PATH = "a LoRA is named as in GET /v1/loras; paths and addresses are not taken"
FORM = 'a list of objects such as {"name": "style.safetensors", "strength": 0.8}, or of texts such as style.safetensors:0.8'
# Names in an object that vLLM-Omni and LightX2V use, and ours. `int_id` is vLLM's own number of a LoRA.
_SAME = {"lora_name": "name", "adapter": "name", "scale": "strength"} | dict.fromkeys(STRENGTHS, "strength")
_NUMBERS = ("int_id", "lora_int_id")
_PLACES = ("path", "lora_path", "url")
_IN_LIST = re.compile(r"loras\[\]\[(\w+)\]", re.ASCII)
_IN_OBJECT = re.compile(r"lora\[(\w+)\]", re.ASCII)


def gathered(pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return a form's pairs with those of LoRA combined: a repeated `loras`, and the names with brackets that OpenAI's client
    makes of lists and objects. Raises InvalidRequestError."""
    rest: list[tuple[str, Any]] = []
    texts: list[Any] = []
    columns: dict[str, list[Any]] = {}
    one: dict[str, Any] = {}
    for name, value in pairs:
        if name in ("loras", "loras[]"):
            texts.append(value)
        elif found := _IN_LIST.fullmatch(name):
            columns.setdefault(found[1], []).append(value)
        elif (found := _IN_OBJECT.fullmatch(name)) and found[1] not in one:
            one[found[1]] = value
        else:
            rest.append((name, value))
    if len({len(values) for values in columns.values()}) > 1:
        allowed = (
            "in a form, the same fields for each, as only their order says which belong together; or one JSON text"
        )
        raise InvalidRequestError("loras", "objects with different fields", allowed)
    if columns:
        rest.append(("loras", [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]))
    if texts:
        rest.append(("loras", texts[0] if len(texts) == 1 else texts))
    if one:
        rest.append(("lora", one))
    return rest


def take_loras(fields: dict[str, Any]) -> None:
    """Replace what a body has of LoRA by `loras`, a list of objects with the fields of `Lora`; nothing if it names none.

    Raises InvalidRequestError, also for a path in place of a name.
    """
    given = {name: value for name in SPELLINGS if (value := fields.pop(name, None)) is not None}
    if path := next((name for name in PATHS if name in given), None):
        raise InvalidRequestError(path, _short(given[path]), NO_PATH)
    strengths = {name: value for name, value in given.items() if name in STRENGTHS}
    if strengths and ("lora_name" not in given or len(strengths) > 1):
        name, value = next(iter(strengths.items()))
        raise InvalidRequestError(name, _short(value), "one strength, together with lora_name")
    names = [name for name in given if name in NAMES]
    if len(names) > 1:
        raise InvalidRequestError(names[1], _short(given[names[1]]), f"give {names[0]} or {names[1]}, not both")
    for name in names:
        entries = [{"name": given[name], **strengths}] if name == "lora_name" else _entries(name, given[name])
        if len(entries) > MOST_LORAS:
            raise InvalidRequestError(name, f"{len(entries)} LoRA", f"at most {MOST_LORAS}", MOST_LORAS)
        if loras := [_lora(name, entry) for entry in entries]:
            fields["loras"] = [lora.model_dump(exclude_none=True) for lora in loras]


def _entries(field: str, given: Any) -> list[Any]:
    if isinstance(given, str):
        text = given.strip()
        if not text.startswith(("[", "{")):
            return [text] if text else []
        try:
            given = parse_json(text)
        except ValueError as error:
            raise InvalidRequestError(field, _short(text), f"JSON ({cut(error, 80)}): {FORM}") from None
    if isinstance(given, dict):
        return [given]
    if not isinstance(given, list):
        raise InvalidRequestError(field, _short(given), FORM)
    return given


def _lora(field: str, entry: Any) -> Lora:
    if isinstance(entry, dict):
        entry = _with_our_names(field, entry)
    elif not isinstance(entry, str):
        raise InvalidRequestError(field, _short(entry), FORM)
    try:
        return Lora.model_validate(entry)
    except ValidationError as error:
        problem = explain(error, Lora.model_fields)
        of_which = "" if problem.field in ("request", field) else f"{cut(problem.field, 40)}: "
        raise InvalidRequestError(
            field, _short(problem.given), f"{of_which}{problem.allowed}", problem.nearest
        ) from None


def _with_our_names(field: str, entry: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in entry.items():
        if value is None or name in _NUMBERS:
            continue
        if name in _PLACES:
            raise InvalidRequestError(field, _short(value), NO_PATH)
        ours = _SAME.get(name, name)
        if ours in found:
            raise InvalidRequestError(field, _short(value), f"one {ours} for each LoRA")
        found[ours] = value
    return found


def _short(given: Any) -> Any:
    return given if isinstance(given, int | float) else cut(given, 80)
