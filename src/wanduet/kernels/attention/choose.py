"""Chooses the attention backend for a shape on this machine: checks each for correctness and times it once.

The measurement is stored in a file, so that only the first start on a machine takes this time (about a second).
"""

import logging
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log2
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import (
    SDPA,
    AttentionFn,
    AttentionLseFn,
    Backend,
    available_backends,
    caution_for,
    plain_with_lse,
)
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.measurements import Timing, free_bytes, is_valid, read_all, read_table, stamped, write_table
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.kernels.timing import milliseconds
from wanduet.kernels.verdicts import reason_of

log = logging.getLogger(__name__)

Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, AttentionCall]

# Largest relative error against float32 that counts as rounding; in bf16 every exact kernel has 3e-3.
EXACT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}
APPROXIMATE_TOLERANCE = 8e-2
CHECK_TOKENS = 330  # not a multiple of any kernel's tile
# Longer sequences rank the backends in the same order, and take longer to time.
TIMED_TOKENS = 32768
TIMED_RUNS = 3
# Backends within this factor of the fastest are timed again, alternately, until the GPU reaches its power limit. On a
# cold GPU, the kernels that need less power show no advantage.
CLOSE = 1.05
SUSTAINED_MS, SUSTAINED_ROUNDS = 500.0, 30  # upper limits for each backend
# What the user loses if an installed package cannot be used. On an H100: benchmarks/results/transformer_forward.json.
COSTS = {"flash-attn-4": "on a Hopper GPU attention takes up to a fifth longer"}


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of an attention on one device; `queries` and `keys` in tokens."""

    queries: int
    keys: int
    heads: int
    head_dim: int

    @property
    def timed(self) -> "Shape":
        """The shape to time instead: lengths rounded up to half powers of two, at most `TIMED_TOKENS`."""
        return Shape(_bucket(self.queries), _bucket(self.keys), self.heads, self.head_dim)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend to use, and the measurements of all backends (empty if none were made)."""

    name: str
    fn: AttentionFn
    fn_with_lse: AttentionLseFn
    table: tuple[Timing, ...] = ()


def choose_attention(
    device: torch.device,
    shape: Shape,
    dtype: torch.dtype,
    prefer: str = "auto",
    cache_folder: Path | None = None,
    backends: dict[str, Backend] | None = None,
) -> Choice:
    """Return the fastest exact backend for `shape` on `device`, or the one named by `prefer`.

    Every backend is first compared with float32; one that fails is dropped and logged. Measurements are stored in
    `cache_folder` (see `kernels.measurements`). Approximate backends are used only by name. `backends`: use these
    instead of the installed ones. Raises ConfigError if the named backend is not available or does not work here.
    """
    found = available_backends(device) if backends is None else backends
    if prefer != "auto":
        return _named(prefer, found, device, shape, dtype)
    exact = [backend for backend in found.values() if backend.exact]
    if len(exact) == 1:
        return _choice(exact[0])
    key = _cache_key(device, shape, dtype, exact)
    table = read_table(cache_folder, key)
    known = table is not None and is_valid(table, device)
    if table is None or not known:
        table = stamped(measure(exact, device, shape, dtype), device)
        write_table(cache_folder, key, table)
    timed = {row.name: row.milliseconds for row in table if row.usable and row.milliseconds is not None}
    best = found.get(_fastest(table), SDPA)
    log.info("attention for %s: %s of %s", shape, best.name, timed)
    for row in table:
        if not row.usable:
            _log_unused(row, found[row.name], best.name, known)
    return _choice(best, table)


def remembered(
    device: torch.device, shape: Shape, dtype: torch.dtype, cache_folder: Path
) -> tuple[str, tuple[Timing, ...]] | None:  # fmt: skip
    """Return the name and table that `choose_attention` would read from `cache_folder`; None if it would measure."""
    exact = [backend for backend in available_backends(device).values() if backend.exact]
    table = read_table(cache_folder, _cache_key(device, shape, dtype, exact))
    if table is None or not is_valid(table, device):
        return None
    return _fastest(table), table


def _fastest(table: tuple[Timing, ...]) -> str:
    timed = {row.name: row.milliseconds for row in table if row.usable and row.milliseconds is not None}
    return min(timed, key=lambda name: timed[name]) if timed else SDPA.name


def measured(
    device: torch.device, cache_folder: Path, backends: dict[str, Backend] | None = None
) -> dict[tuple[str, str], tuple[Timing, ...]]:
    """Return the stored tables for a device's model and the installed versions, fastest first.

    The keys are the dtype and the timed shape, as `queries x keys x heads x channels of a head`.
    """
    found = available_backends(device) if backends is None else backends
    start = _cache_start(device, [backend for backend in found.values() if backend.exact])
    tables = {}
    for key in read_all(cache_folder):
        dtype, _, shape = key.removeprefix(start).partition("|")
        if key.startswith(start) and (table := read_table(cache_folder, key)):
            tables[dtype.removeprefix("torch."), shape.replace("x", " x ")] = table
    return tables


def choose_together(choices: Sequence[tuple[str, tuple[Timing, ...]]], device: torch.device) -> Choice:
    """Choose one backend for all devices of a group: the one that is fastest on the device where it is slowest.

    `choices`: for each device, the name and table of its own choice; the first one is used if no backend works on all.
    """
    chosen = choices[0][0]
    if any(name != chosen for name, _ in choices):
        tables = [{row.name: _milliseconds(row) for row in table if row.usable} for _, table in choices]
        common = [name for name in tables[0] if all(name in table for table in tables)]
        chosen = min(common, key=lambda name: max(table[name] for table in tables), default=chosen)
    return _choice(available_backends(device)[chosen])


def measure(backends: Sequence[Backend], device: torch.device, shape: Shape, dtype: torch.dtype) -> tuple[Timing, ...]:
    """Check and time each backend; return the rows, fastest first."""
    rows = []
    for backend in backends:
        row = _check(backend, device, shape, dtype)
        if row.usable:
            row = _time(backend, row, device, shape.timed, dtype)
        rows.append(row)
    rows = _timed_alternately(rows, {backend.name: backend for backend in backends}, device, shape.timed, dtype)
    return tuple(sorted(rows, key=_milliseconds))


def _named(name: str, found: dict[str, Backend], device: torch.device, shape: Shape, dtype: torch.dtype) -> Choice:
    if name not in found:
        raise ConfigError(f"attention={name!r} is not available here.", hint=f"Available: auto, {', '.join(found)}.")
    backend = found[name]
    if backend is SDPA:
        return _choice(backend)
    if (caution := caution_for(backend)) is not None:
        log.warning("%s", caution)
    row = _check(backend, device, shape, dtype)
    if not row.usable:
        hint = "Free some memory, or use auto." if row.free_bytes is not None else "Use auto."
        raise ConfigError(f"attention={name!r} does not work here: {row.problem}.", hint=hint)
    return _choice(backend, (row,))


def _choice(backend: Backend, table: tuple[Timing, ...] = ()) -> Choice:
    return Choice(backend.name, backend.attend, backend.attend_with_lse or plain_with_lse, table)


@torch.no_grad()
def _check(backend: Backend, device: torch.device, shape: Shape, dtype: torch.dtype) -> Timing:
    """Compare a backend with float32 on a short sequence; q, k and v are slices of one buffer, as in the model."""
    small = Shape(CHECK_TOKENS, min(shape.keys, CHECK_TOKENS), shape.heads, shape.head_dim)
    try:
        q, k, v, call = _random_inputs(small, device, dtype)
        with PRODUCTS.at(EXACT):
            expected, expected_lse = plain_with_lse(q.float(), k.float(), v.float())
        error = _relative(backend.attend(q, k, v, call), expected)
        lse_error = 0.0
        if backend.attend_with_lse is not None:
            out, lse = backend.attend_with_lse(q, k, v, call)
            error = _worse(error, _relative(out, expected))
            lse_error = (lse.float() - expected_lse).abs().max().item()
    except Exception as problem:  # a kernel's library can raise any exception
        return _failure(backend, None, problem, device)
    tolerance = EXACT_TOLERANCE[dtype] if backend.exact else APPROXIMATE_TOLERANCE
    if not error <= tolerance:  # also true for NaN
        return Timing(backend.name, None, None, f"wrong result (relative error {error:.1e})")
    if not lse_error <= tolerance:
        return Timing(backend.name, None, None, f"wrong log-sum-exp (error {lse_error:.1e})")
    return Timing(backend.name, None, error)


@torch.no_grad()
def _time(backend: Backend, row: Timing, device: torch.device, shape: Shape, dtype: torch.dtype) -> Timing:
    """Return `row` with the median time at `shape`, or with a problem if the result is not finite there."""
    try:
        inputs = _random_inputs(shape, device, dtype)
        finite = bool(torch.isfinite(backend.attend(*inputs)).all())
        times = _timed(backend.attend, inputs, device)
    except Exception as problem:
        return _failure(backend, row.error, problem, device)
    if not finite:
        return Timing(backend.name, None, row.error, f"not finite at {shape.queries} tokens")
    return Timing(backend.name, statistics.median(times), row.error)


def _milliseconds(row: Timing) -> float:
    return float("inf") if row.milliseconds is None else row.milliseconds


@torch.no_grad()
def _timed_alternately(
    rows: list[Timing], backends: dict[str, Backend], device: torch.device, shape: Shape, dtype: torch.dtype
) -> list[Timing]:
    """Return the rows; backends close to the fastest are timed again, alternately."""
    limit = CLOSE * min(map(_milliseconds, rows), default=0.0)
    close = [row for row in rows if row.milliseconds is not None and row.milliseconds <= limit]
    if len(close) < 2:
        return rows
    seen: dict[str, list[float]] = {row.name: [] for row in close}
    try:
        inputs = _random_inputs(shape, device, dtype)
        for _ in range(min(SUSTAINED_ROUNDS, max(1, round(SUSTAINED_MS / (TIMED_RUNS * limit))))):
            for name, times in seen.items():
                times += _timed(backends[name].attend, inputs, device)
    except torch.OutOfMemoryError:  # another program has allocated memory since
        return rows
    medians = {name: statistics.median(times) for name, times in seen.items()}
    return [replace(row, milliseconds=medians.get(row.name, row.milliseconds)) for row in rows]


def _timed(attend: AttentionFn, inputs: Inputs, device: torch.device) -> list[float]:
    """Return the milliseconds of each of `TIMED_RUNS` calls."""
    return milliseconds(partial(attend, *inputs), device, TIMED_RUNS)


def _random_inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Return q, k, v `[1, L, H, D]`; if lengths are equal, as slices of a packed `[1, L, 3 * H * D]` buffer.

    The call is that of a video of one row.
    """
    generator = torch.Generator(device).manual_seed(0)
    width = shape.heads * shape.head_dim

    def draw(length: int, parts: int) -> tuple[Tensor, ...]:
        x = torch.randn(1, length, parts * width, device=device, dtype=dtype, generator=generator)
        return tuple(part.unflatten(-1, (shape.heads, shape.head_dim)) for part in x.chunk(parts, dim=-1))

    if shape.queries == shape.keys:
        q, k, v = draw(shape.queries, 3)
    else:
        (q,), (k, v) = draw(shape.queries, 1), (draw(shape.keys, 1)[0], draw(shape.keys, 1)[0])
    return q, k, v, AttentionCall((1, 1, shape.keys))


def _bucket(length: int) -> int:
    half_powers = -(-2 * log2(max(length, 16)) // 1)
    return min(TIMED_TOKENS, round(2 ** (half_powers / 2)))


def _relative(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


def _worse(a: float, b: float) -> float:
    return a if a != a or a > b else b  # NaN counts as worst


def _failure(backend: Backend, error: float | None, problem: Exception, device: torch.device) -> Timing:
    log.info("Attention back end %s failed.", backend.name, exc_info=problem)
    short = isinstance(problem, torch.OutOfMemoryError)
    return Timing(
        backend.name, None, error, reason_of(problem), free_bytes=free_bytes(device) if short else None
    )  # fmt: skip


def _log_unused(row: Timing, backend: Backend, instead: str, known: bool) -> None:
    """Log one sentence: a warning if the failure is new and unexpected, else at level INFO.

    PyTorch's own backends do not support all GPUs and dtypes, and raise an exception then; this is expected.
    """
    news = not known and (backend.package is not None or row.error is not None or "wrong" in (row.problem or ""))
    costs = COSTS.get(backend.package or "")
    log.log(
        logging.WARNING if news else logging.INFO,
        "Attention back end %s is not used%s: %s. %s runs instead%s.",
        row.name,
        " (it is tried again after a day, or when something here has changed)" if known else "",
        row.problem,
        instead,
        f"; {costs}" if costs else "",
    )


def _cache_key(device: torch.device, shape: Shape, dtype: torch.dtype, backends: Iterable[Backend]) -> str:
    timed = shape.timed
    return f"{_cache_start(device, backends)}{dtype}|{timed.queries}x{timed.keys}x{timed.heads}x{timed.head_dim}"


def _cache_start(device: torch.device, backends: Iterable[Backend]) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = ",".join(f"{b.name}={b.version}" for b in backends)
    return f"{name}|{versions}|"
