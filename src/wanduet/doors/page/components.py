"""Gradio's components for the fields of a request: what fits a field's type, its limits and its value."""

from typing import Any

import gradio as gr
from gradio.components import Component

from wanduet.doors.http.schemas import RequestLimits
from wanduet.request import RequestField

_LONGEST_NUMBER = 20  # characters


def component(field: RequestField, value: Any, limits: RequestLimits) -> Component:
    """A slider, a menu, a switch or a box of text that shows `value`; "" is an empty box, also for a number."""
    shown, label = field.shown, field.shown.caption or field.label
    if field.choices:
        return gr.Dropdown(list(field.choices), value=value, label=label, min_width=120)
    if field.kind is bool:
        return gr.Checkbox(bool(value), label=label, min_width=120)
    if field.kind is str:
        return gr.Textbox(value, label=label, lines=2, max_lines=6, placeholder=shown.placeholder)
    low, high = shown.span or (field.limits.get("ge"), field.limits.get("le"))
    largest = [most for most in (high, limits.of(field)) if most is not None]
    if value == "" or low is None or not largest:
        return gr.Textbox(
            str(value), label=label, max_length=_LONGEST_NUMBER, placeholder=shown.placeholder, min_width=120
        )
    return gr.Slider(low, min(largest), value, step=shown.step, label=label, min_width=140, buttons=[])
