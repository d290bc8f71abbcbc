"""Shapes of a LoRA file's tensors: what they say of the model that it was made for, and whether they fit a parameter."""

import math
from collections.abc import Mapping
from pathlib import Path

from wanduet.errors import WeightsError

Shape = tuple[int, ...]
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_WEIGHTS = ("down", "up", *LOHA, "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "diff")
_INPUT = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "time_proj", "proj_out")  # hidden size in
_OTHER_OUTPUT = ("ffn.net.0.proj", "time_proj", "proj_out")  # another size out


def flat(shape: Shape) -> Shape:
    """Return a shape as that of a matrix: all axes but the first in one."""
    return shape[0] if shape else 1, math.prod(shape[1:])


def product_of(shapes: Mapping[str, Shape], name: str) -> tuple[Shape | None, int | None]:
    """Return the shape of a LoKr factor that is given whole or as a product, and the rank of the product.

    None for a factor that is missing or half missing, or whose halves do not fit each other.
    """
    if name in shapes:
        return flat(shapes[name]), None
    if f"{name}_a" not in shapes or f"{name}_b" not in shapes:
        return None, None
    (rows, rank), (other, columns) = flat(shapes[f"{name}_a"]), flat(shapes[f"{name}_b"])
    return ((rows, columns), rank) if rank == other else (None, None)


def extent(shapes: Mapping[str, Shape]) -> Shape | None:
    """Return the shape, as a matrix [out, in], of the change that tensors make to a weight; None if they make none.

    `shapes`: of one module's tensors, by what they mean. A part that is missing is given as 0.
    """
    if "down" in shapes or "up" in shapes:
        return flat(shapes.get("up", (0,)))[0], flat(shapes.get("down", (0, 0)))[1]
    if "hada_w1_a" in shapes and "hada_w1_b" in shapes:
        return shapes["hada_w1_a"][0], flat(shapes["hada_w1_b"])[1]
    w1, w2 = product_of(shapes, "lokr_w1")[0], product_of(shapes, "lokr_w2")[0]
    if w1 and w2:
        return w1[0] * w2[0], w1[1] * w2[1]
    return flat(shapes["diff"]) if "diff" in shapes else None


def hidden_size(groups: Mapping[str, Mapping[str, Shape]]) -> int | None:
    """Return the hidden size of the transformer that a LoRA was made for; None if no tensor shows it."""
    for module, shapes in groups.items():
        if "image_embedder" in module:  # widths of CLIP
            continue
        if "norm" in module or module.endswith("scale_shift_table"):
            found = shapes.get("diff", (0,))[-1]
        else:
            rows, columns = extent(shapes) or (0, 0)
            found = columns if module.endswith(_INPUT) else 0
            if not found and not module.endswith(_OTHER_OUTPUT):
                found = rows or shapes.get("diff_b", (0,))[0]
        if found:
            return found
    return None


def check_shapes(path: Path, module: str, shapes: Mapping[str, Shape], parameters: tuple[Shape, Shape | None]) -> None:
    """Raise WeightsError if one module's tensors are incomplete or of the wrong shape.

    `path`: the file, for messages. `parameters`: shapes of the module's weight and bias.
    """
    if problem := _problem(shapes, *parameters):
        given = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
        raise WeightsError(f"{path}: {module} {problem}: {given}; the model's weight is {list(parameters[0])}.")


def _problem(shapes: Mapping[str, Shape], base: Shape, bias: Shape | None) -> str | None:
    if len(base) < 2 and any(name in shapes for name in _WEIGHTS if name != "diff"):
        return "is a product, but its weight is no matrix"
    if problem := incomplete(shapes) or _misfit(shapes, flat(base)):
        return problem
    if "diff" in shapes and _squeezed(shapes["diff"]) != _squeezed(base):
        return "has a difference of another shape"
    if any(name in shapes and shapes[name] != bias for name in ("diff_b", "up_bias")):
        return f"has a change of a bias of another shape than the model's, {list(bias or ())}"
    if math.prod(shapes.get("alpha", ())) != 1:
        return "has an alpha of more than one value"
    taps = tuple(1 for _ in base[2:])
    columns = (1, *base[1:2], *taps)
    if shapes.get("dora_scale", columns) not in (columns, (base[0], 1, *taps), base[:1]) or (
        math.prod(shapes.get("magnitude", base[:1])) != base[0]
    ):
        return "has magnitudes (DoRA) of another size"
    return None


def incomplete(shapes: Mapping[str, Shape]) -> str | None:
    """Return what one module's tensors lack to be an update; None if nothing."""
    for both in (("down", "up"), LOHA):
        missing = [name for name in both if name not in shapes]
        if missing and len(missing) < len(both):
            return f"is incomplete, it lacks {', '.join(missing)}"
    lokr = [name for name in shapes if name.startswith("lokr_")]
    if lokr and any(product_of(shapes, name)[0] is None for name in ("lokr_w1", "lokr_w2")):
        return "is incomplete, or its LoKr factors do not fit each other"
    factors = [name for name in _WEIGHTS if name in shapes]
    products = [name for name in factors if name != "diff"]
    scaling = [name for name in ("magnitude", "dora_scale", "up_bias") if name in shapes and not products]
    if without := scaling or [name for name in ("alpha",) if name in shapes and not factors]:
        return f"is incomplete, it has {', '.join(without)} without matrices"
    return None


def _misfit(shapes: Mapping[str, Shape], base: Shape) -> str | None:
    pairs = [("up", "down"), LOHA[:2], LOHA[2:]]
    for left, right in pairs:
        if left in shapes:
            (rows, rank), (other, columns) = flat(shapes[left]), flat(shapes[right])
            if rank != other or not rank or (rows, columns) != base:
                return "has matrices that do not fit"
    if any(name.startswith("lokr_") for name in shapes):
        w1, w2 = product_of(shapes, "lokr_w1")[0], product_of(shapes, "lokr_w2")[0]
        if w1 and w2 and (w1[0] * w2[0], w1[1] * w2[1]) != base:
            return "has LoKr factors that do not fit"
    return None


def _squeezed(shape: Shape) -> Shape:
    return tuple(size for size in shape if size != 1)
