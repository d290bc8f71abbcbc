"""The page's form: its fields, their defaults, and the presets, each of which sets a field."""

import math
from collections.abc import Mapping
from typing import Any

from wanduet.doors.http.schemas import RequestLimits
from wanduet.doors.page.clips import Clip, clip_of
from wanduet.family.spec import GenerationDefaults
from wanduet.family.speeds import EXACT, SpeedName, fields_set_by
from wanduet.family.step_caches import FEWEST_STEPS
from wanduet.loras import Lora
from wanduet.request import REQUEST_FIELDS
from wanduet.request_fields import RequestField
from wanduet.schedule import joined

Form = dict[str, Any]

SIZE = "size"  # WIDTHxHEIGHT, in place of two fields
# The form's fields, each with the request's field that it shows (the first, if it shows several).
FORM_FIELDS: dict[str, RequestField] = {}
for _field in REQUEST_FIELDS.values():
    FORM_FIELDS.setdefault(_field.shown.within or _field.name, _field)
LORAS = "loras"  # a list of objects, as `POST /v1/videos` takes them
FILE_FIELDS = tuple(name for name, field in FORM_FIELDS.items() if field.shown.is_file)  # their values are `Clip`s
_UNPLACED = 100  # sorts after all fields with a row number
_LONGEST_NUMBER = 20  # characters
_LONGEST_LIST = 2000
_MULTIPLE = 16  # pixels: the VAE's stride times the transformer's patch size
_LENGTHS = (0.6, 1.0, 1.6)  # times the model's default length: 3, 5 and 8 seconds for Wan
_QUALITIES: dict[str, SpeedName] = {"Draft": "draft", "Standard": "near", "Fine": EXACT}

EXAMPLES = (
    "A red fox walks through fresh snow at dawn, soft light, shallow depth of field",
    "Waves roll onto a black sand beach under heavy clouds, seen from above",
    "A paper boat drifts down a rain-soaked street, neon reflections, close-up",
)
SMALL_EXAMPLES = (
    "a red circle moving left on a black background",
    "a blue star spinning on a gray background",
    "a green square growing on a black background",
)
_SMALL = 256 * 256  # pixels; a smaller model is trained on shapes, not scenes


class Presets:
    """The values of the page's three rows of preset buttons. Each row maps labels to values of one field."""

    def __init__(self, defaults: GenerationDefaults) -> None:
        width, height = defaults.width, defaults.height
        seconds = (defaults.num_frames - 1) / defaults.fps
        small = width * height <= _SMALL
        self.examples = SMALL_EXAMPLES if small else EXAMPLES
        self.shapes = _shapes(width, height)
        self.sizes = list(dict.fromkeys([*self.shapes.values(), *(() if small else ("1280x720", "720x1280"))]))
        lengths = dict.fromkeys(max(1, round(seconds * share)) for share in _LENGTHS)
        self.lengths = {f"{length} s": 4 * round(length * defaults.fps / 4) + 1 for length in lengths}
        self.qualities = _QUALITIES
        if defaults.timesteps or defaults.num_inference_steps < FEWEST_STEPS["easycache"]:  # none is left out
            self.qualities = {"Standard": EXACT}
        # By the field that a row sets.
        self.rows: dict[str, Mapping[str, str | int]] = {
            SIZE: self.shapes,
            "num_frames": self.lengths,
            "speed": self.qualities,
        }


def default_form(defaults: GenerationDefaults) -> Form:
    """Return the model's defaults, else the engine's; "" for a field without either, None for a file."""
    found = {name: getattr(defaults, name, field.default) for name, field in FORM_FIELDS.items()}
    found |= {name: field.shown.start for name, field in FORM_FIELDS.items() if field.shown.start is not None}
    form = {name: shown_value(value) for name, value in found.items()}
    return form | dict.fromkeys(FILE_FIELDS) | {SIZE: f"{defaults.width}x{defaults.height}", LORAS: []}


def form_of(request: dict[str, Any], defaults: Form, files: Mapping[str, Clip] | None = None) -> Form:
    """Convert a stored request, or one in a video's metadata, to a form. `files`: the form's input files, by field."""
    given = {name: shown_value(request[name]) for name in FORM_FIELDS if request.get(name) is not None}
    by_speed = fields_set_by(given.get("speed"))
    off = {name for name in by_speed if given.get(name) == FORM_FIELDS[name].shown.off}
    if given.get("guidance_scale", 2) <= 1:
        off.discard("guidance_gate")  # there is no guidance to end, with any speed
    if off:
        del given["speed"]  # the form omits fields that are off, and the speed would set them
        by_speed = {}
    given = {name: value for name, value in given.items() if name not in by_speed or value != by_speed[name]}
    # What a field replaces was used instead of it, so the model's default of that field was not.
    replaced = {name: given.keys() & set(field.shown.replaces) for name, field in FORM_FIELDS.items()}
    unused = {name: "" for name, others in replaced.items() if others and name not in given}
    form = {**defaults, **given, **unused}
    # Fields that may be empty are text boxes.
    form |= {name: str(form[name]) for name, value in defaults.items() if value == ""}
    if request.get("width") and request.get("height"):
        form[SIZE] = f"{request['width']}x{request['height']}"
    form[LORAS] = [Lora(**lora).recorded() for lora in request.get(LORAS) or ()]
    return form | dict.fromkeys(FILE_FIELDS) | dict(files or {})


def shown_value(value: Any) -> Any:
    """Return a value as the form has it: "" for None, a list of numbers as text."""
    if value is None:
        return ""
    return joined(value) if isinstance(value, list | tuple) else value


def fields_of(form: Form) -> dict[str, Any]:
    """Convert a form to the fields of an API request, without its files.

    Empty fields, those that are off, those that need a missing one and those that another one replaces are omitted, floats
    of integer fields converted.
    """
    known = {
        name: field
        for name, field in FORM_FIELDS.items()
        if _applies(field, form) and (field.shown.off is None or form.get(name) != field.shown.off)
    }
    fields = {name: form[name] for name in known if form.get(name) is not None and str(form[name]).strip()}
    for name, field in known.items():
        if field.kind is str and field.default is None and not field.is_required:
            fields[name] = form.get(name) or ""  # keep a text that the visitor cleared, instead of the model's default
        if field.kind is int and isinstance(value := fields.get(name), float) and value.is_integer():
            fields[name] = int(value)
    return fields | ({LORAS: form[LORAS]} if form.get(LORAS) else {})


def clips_of(form: Form) -> dict[str, Clip]:
    """Return the form's input files, by field."""
    return {name: form[name] for name in FILE_FIELDS if form.get(name)}


def _applies(field: RequestField, form: Form) -> bool:
    given = {name for name, other in FORM_FIELDS.items() if field.name in other.shown.replaces and form.get(name)}
    return not (field.shown.is_file or given) and (field.shown.needs is None or bool(form.get(field.shown.needs)))


def form_rows() -> list[list[str]]:
    """Return the rows of the form's settings; fields without a row number come last, one a row.

    The prompt, the files and what belongs to them are no settings.
    """
    rows: dict[float, list[str]] = {}
    for number, (name, field) in enumerate(FORM_FIELDS.items()):
        if not (field.is_required or field.shown.is_file or field.shown.needs):
            rows.setdefault(field.shown.row or _UNPLACED + number, []).append(name)
    return [rows[number] for number in sorted(rows)]


def describe(field: RequestField, value: Any, limits: RequestLimits) -> dict[str, Any]:
    """Return what the page needs to know to build a field that shows `value`.

    `kind`: "file"; "choice" (of `choices`); "switch" for booleans; "text"; "short" for lists and numbers that may be
    empty; "number" for other numbers, with `min`, `max` and `step`.
    """
    shown = field.shown
    about: dict[str, Any] = {"label": shown.caption or field.label, "name": field.label, "help": field.help}
    about |= {"needs": shown.needs, "replaces": list(shown.replaces), "placeholder": shown.placeholder or ""}
    if shown.is_file:
        return about | {"kind": "file"}
    if field.choices:
        return about | {"kind": "choice", "choices": list(field.choices)}
    if field.kind is bool:
        return about | {"kind": "switch"}
    if field.kind is str:
        return about | {"kind": "text", "lines": shown.lines}
    low, high = shown.span or (field.limits.get("ge"), field.limits.get("le"))
    largest = [most for most in (high, limits.of(field)) if most is not None]
    if field.is_list or value == "" or low is None or not largest:
        return about | {"kind": "short", "longest": _LONGEST_LIST if field.is_list else _LONGEST_NUMBER}
    return about | {"kind": "number", "min": low, "max": min(largest), "step": shown.step}


def read_form(given: Mapping[str, Any]) -> Form:
    """Return the form that a browser sent: the known fields, with a `Clip` for each file."""
    form = {name: given.get(name) for name in (*FORM_FIELDS, LORAS)}
    return form | {name: clip_of(form[name]) for name in FILE_FIELDS}


def _shapes(width: int, height: int) -> dict[str, str]:
    """Return a wide, a tall and a square size.

    Unless the model's default size is square, each has about as many pixels as it.
    """
    if width == height:
        long, short, side = down(width * 5 / 3), width, width
    else:
        long, short, side = max(width, height), min(width, height), down(math.sqrt(width * height))
    return {"Wide": f"{long}x{short}", "Tall": f"{short}x{long}", "Square": f"{side}x{side}"}


def down(pixels: float) -> int:
    """Return the largest side that a video may have of at most so many pixels."""
    return max(_MULTIPLE, int(pixels) // _MULTIPLE * _MULTIPLE)
