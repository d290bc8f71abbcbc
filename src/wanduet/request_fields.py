"""What the interfaces read of a request's fields: `RequestField`, `Shown`, how a field is displayed, and errors.

The fields themselves are in `wanduet.request`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from pydantic_core import PydanticKnownError

from wanduet.errors import InvalidRequestError

LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}  # of numbers, by pydantic's names


def _refuse_bool(kind: Literal["int_type", "float_type"]) -> BeforeValidator:
    """Reject booleans, which Python counts as integers: a seed of `true` is a mistake, not 1."""

    def check(value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticKnownError(kind)
        return value

    return BeforeValidator(check)


# The types of a request's numbers.
Whole = Annotated[int, _refuse_bool("int_type")]
Real = Annotated[float, Field(allow_inf_nan=False), _refuse_bool("float_type")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """How the interfaces display a field, besides its name, type, limits and description."""

    label: str | None = None  # on the page; None: derived from the name
    caption: str | None = None  # longer label, above the field in the page's form; None: the label
    detail: str | None = None  # label in the page's list of a video's settings; None: `label`, "": not listed
    row: int | None = None  # row of the form's settings; fields of one row are side by side; None: below, alone
    within: str | None = None  # the form's field that combines several fields of a request
    span: tuple[float, float] | None = None  # range of the form's slider; None: the field's limits
    step: float = 1  # step of that slider
    start: float | str | None = None  # what the form shows at first, for a field without a default
    placeholder: str | None = None  # in the form's empty field
    aliases: tuple[str, ...] = ()  # additional command line flags
    limit: str | None = None  # the field of a server's `RequestLimits` that is this field's maximum
    off: str | float | None = None  # a value with which the field does nothing, and is not listed
    is_file: bool = False  # the value is a file's path; a server takes the file itself, as a part of a form
    lines: int = 2  # height of the form's box for a text
    needs: str | None = None  # the field without which this one is not allowed
    replaces: tuple[str, ...] = ()  # the fields that follow from this one, and are not given together with it


@dataclass(frozen=True, slots=True)
class RequestField:
    """A field of a request, as the interfaces read it.

    `kind`: int, float, bool, str, a Literal or `tuple[float, ...]`. `default`: None if the model or the engine chooses,
    and for the prompt.
    """

    name: str
    kind: Any
    is_required: bool
    default: Any
    limits: Mapping[str, float]  # by pydantic's names: ge, gt, le, lt
    help: str
    shown: Shown

    @property
    def is_number(self) -> bool:
        """Whether the field is an int or a float."""
        return self.kind in (int, float)

    @property
    def is_list(self) -> bool:
        """Whether the field is a list of numbers. Where there are no lists, it is text, see `schedule.joined`."""
        return get_origin(self.kind) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values of a Literal; else ()."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def takes(self) -> str:
        """The type of its values for people, without the limits."""
        if self.shown.is_file:
            return "a file"
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.is_list:
            return "a list of numbers"
        return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[self.kind]

    @property
    def label(self) -> str:
        """The field's name for people."""
        return self.shown.label or self.name.replace("_", " ").capitalize()


def fields_of(model: type[BaseModel]) -> dict[str, RequestField]:
    """Read the fields of a request from its model, by their names, without those that are lists of objects."""
    kinds = get_type_hints(model)  # without the metadata of Annotated
    found = {}
    for name, field in model.model_fields.items():
        if _is_nested(kinds[name]):
            continue
        kind = next((k for k in get_args(kinds[name]) if NoneType in get_args(kinds[name]) and k is not NoneType), None)
        limits = {key: getattr(one, key) for one in field.metadata for key in LIMITS if hasattr(one, key)}
        found[name] = RequestField(
            name=name,
            kind=kind or kinds[name],
            is_required=field.is_required(),
            default=None if field.is_required() else field.default,
            limits=limits,
            help=field.description or "",
            shown=next((one for one in field.metadata if isinstance(one, Shown)), Shown()),
        )
    return found


def _is_nested(kind: Any) -> bool:
    """Whether a field's values are lists of objects, which each interface spells in its own way."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return True
    return any(map(_is_nested, get_args(kind)))


def explain(error: ValidationError, fields: Collection[str]) -> InvalidRequestError:
    """Convert the first problem of a pydantic error to an InvalidRequestError with the nearest allowed value.

    `fields`: the names that a request has.
    """
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "request"  # an entry of a list counts as its field
    context = first.get("ctx", {})
    bounds = {"greater_than_equal": "ge", "less_than_equal": "le"}
    nearest = context.get(bounds.get(first["type"], ""))
    given = None if first["type"] == "missing" else first.get("input")  # the input would be all other fields
    if first["type"] == "extra_forbidden":
        return InvalidRequestError(name, given, no_such_field(str(first["loc"][-1]), fields))
    allowed = _allowed(first["type"], first["msg"], context)
    if len(first["loc"]) > 2:  # of an object in a list
        allowed = f"{first['loc'][2]}: {allowed}"
    return InvalidRequestError(name, given, allowed, nearest)


def no_such_field(name: str, fields: Collection[str]) -> str:
    """Return the message for an unknown field, with the one that is probably meant."""
    from difflib import get_close_matches

    near = [field for field in fields if field.endswith(f"_{name}")] or get_close_matches(name, fields, 1, 0.75)
    return (
        f"there is no such field; {f'did you mean {near[0]}? ' if len(near) == 1 else ''}Fields are {', '.join(fields)}"
    )


def _allowed(kind: str, message: str, context: dict[str, Any]) -> str:
    match kind:
        case "string_too_short":
            return "a text that is not empty"
        case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
            return next(f"{LIMITS[key]} {limit}" for key, limit in context.items() if key in LIMITS)
        case "literal_error":
            return f"one of {context['expected']}"
        case "missing":
            return "it must be given"
        case "int_parsing" | "int_type" | "int_from_float" | "int_parsing_size":
            return "a whole number"
        case "float_parsing" | "float_type":
            return "a number"
        case "tuple_type":
            return "a list of numbers"
        case "finite_number":
            return "a finite number"
        case _:
            return message[0].lower() + message[1:]
