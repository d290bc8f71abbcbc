"""Times calls on a device, whatever the host does meanwhile."""

import time
from collections.abc import Callable
from itertools import pairwise

import torch

# Seconds that a GPU sleeps while the calls to time are launched, and the number of attempts if that is too short.
LAUNCH_S, LAUNCH_TRIES = 0.002, 5
CYCLES_PER_S = 2e9


def milliseconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> list[float]:
    """Return the milliseconds of each of `calls` calls, one after the other.

    On a GPU, the calls are launched while it sleeps. Other threads load and compile at the same time; otherwise the
    timing of a call that runs much Python to launch would include waits for the GIL, and that of a short one its launch.
    """
    if device.type != "cuda":
        return [_on_host(call) for _ in range(calls)]
    stream, wait_s = torch.cuda.current_stream(device), LAUNCH_S
    for _ in range(LAUNCH_TRIES):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        began = time.perf_counter()
        torch.cuda._sleep(int(wait_s * CYCLES_PER_S))
        events[0].record(stream)
        for event in events[1:]:
            call()
            event.record(stream)
        launched_s = time.perf_counter() - began
        events[-1].synchronize()
        if launched_s < wait_s:
            break
        wait_s = 2 * launched_s
    return [float(before.elapsed_time(after)) for before, after in pairwise(events)]


def _on_host(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3
