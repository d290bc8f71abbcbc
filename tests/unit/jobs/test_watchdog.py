"""What counts as a hang and what does not, by a clock in hand."""

import math
import os
import time
from pathlib import Path

import pytest
from fake_engine import Event

from wanduet.jobs.leases import BeatWatch, read_beat
from wanduet.jobs.watchdog import HangSettings, Patience, Watchdog

SETTINGS = HangSettings()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A watchdog that looks once a second."""

    def __init__(self, beat: Path | None = None) -> None:
        self.clock = Clock()
        self.watchdog = Watchdog(SETTINGS, beat, monotonic=self.clock)

    def after(self, seconds: float) -> str | None:
        for _ in range(math.ceil(seconds)):
            self.clock.now += 1.0
            self.watchdog.iterated()
            if (what := self.watchdog.look()) is not None:
                return what
        return None


def test_a_job_hangs_when_its_next_sign_is_overdue() -> None:
    bench = Bench()
    job = bench.watchdog.add("a")
    assert bench.after(SETTINGS.phase_seconds - 1) is None
    job.expect(600.0)
    assert bench.after(599.0) is None
    assert "a" in (bench.after(2.0) or "")
    job.expect(math.inf)  # it waits for a disk, which nobody can say the end of
    assert bench.after(10_000) is None
    bench.watchdog.remove("a")
    assert bench.after(10_000) is None


def test_the_beat_says_what_a_process_waits_for_that_gets_nothing_done(tmp_path: Path) -> None:
    beat = tmp_path / "host.0.beat"
    watchdog = Watchdog(HangSettings(look_seconds=0.01), beat)
    watchdog.start()

    def says(text: str | None) -> None:
        end = time.monotonic() + 60.0
        while read_beat(beat) != text:
            assert time.monotonic() < end
            time.sleep(0.01)

    one, other = watchdog.add("one"), watchdog.add("other")
    one.expect(math.inf, "it waits\nfor a disk that is full")
    other.expect(math.inf, "it waits for threads")
    says("it waits for a disk that is full")
    other.expect(600.0)  # it goes on
    says(None)
    watchdog.iterated("it waits")
    says("it waits")
    watchdog.iterated()
    says(None)
    watchdog.stop()
    assert read_beat(tmp_path / "of nobody") is None


def test_a_job_that_waits_for_anothers_stage_does_not_hang() -> None:
    bench = Bench()
    waiting, working = bench.watchdog.add("waiting"), bench.watchdog.add("working")
    waiting.expect(1800.0)
    for _ in range(50):  # ten hours of steps of twelve minutes
        working.expect(3600.0)
        assert bench.after(720.0) is None
    assert "working" in (bench.after(3600.0) or ""), "now it does, and the other still waits for it"


def test_a_cancelled_job_that_does_not_leave_the_engine_is_a_hang_though_others_work() -> None:
    bench = Bench()
    cancelled, quick, working = (bench.watchdog.add(name) for name in ("cancelled", "quick", "working"))
    bench.after(1.0)
    cancelled.leave()
    quick.leave()
    working.expect(600.0)
    assert bench.after(SETTINGS.cancel_seconds) is None
    quick.left()
    assert bench.after(1.0) == "cancelled was cancelled and does not leave the engine"
    cancelled.left()
    cancelled.leave()  # the lease's thread may notice the cancel only now
    assert bench.after(500.0) is None


def test_a_pause_of_the_whole_machine_is_no_hang() -> None:
    bench = Bench()
    bench.watchdog.add("a").expect(600.0)
    for _ in range(100):
        bench.clock.now += 3600.0
        bench.watchdog.iterated()
        assert bench.watchdog.look() is None


def test_a_loop_that_stands_still_is_found_though_no_job_runs() -> None:
    clock = Clock()
    watchdog = Watchdog(SETTINGS, monotonic=clock)

    def looks(seconds: float) -> str | None:
        for _ in range(int(seconds)):
            clock.now += 1.0
            if (what := watchdog.look()) is not None:
                return what
        return None

    assert looks(SETTINGS.start_seconds - 1) is None, "weights may have to come from far away"
    watchdog.iterated()
    assert looks(SETTINGS.loop_seconds - 1) is None
    assert "loop" in (looks(2) or "")


@pytest.mark.parametrize(
    ("predicted", "seconds"), [({}, 360.0), ({"denoise": 360.0}, 500.0), ({"denoise": 1.0}, 590.0)]
)
def test_long_steps_are_no_hang(predicted: dict[str, float], seconds: float) -> None:
    """Six minutes for a step at 1080p on a slow card, with and without a prediction."""
    clock = Clock()
    patience = Patience(SETTINGS, predicted, clock)
    assert patience.after(Event("encode", 0, 1)) >= 1800.0, "minutes of text on a CPU"
    assert patience.after(Event("denoise", 0, 50)) >= 1800.0, "kernels are compiled"
    for step in range(1, 50):
        clock.now += seconds
        allowed = patience.after(Event("denoise", step, 50))
        assert allowed > 1.2 * seconds
        assert step < 2 or allowed >= SETTINGS.factor * seconds
    assert patience.after(Event("denoise", 50, 50)) >= 1800.0, "the decode follows, or a wait for it"


def test_quick_steps_that_stop_are_found_soon() -> None:
    clock = Clock()
    patience = Patience(SETTINGS, {"denoise": 0.9, "decode": 10.0}, clock)
    patience.after(Event("denoise", 0, 50))
    clock.now += 1.0
    assert patience.after(Event("denoise", 1, 50)) == SETTINGS.step_seconds


def test_a_decode_gets_by_its_prediction_where_that_is_long() -> None:
    patience = Patience(SETTINGS, {"decode": 3600.0})
    assert (
        patience.after(Event("denoise", 50, 50)) == patience.after(Event("decode", 1, 81)) == SETTINGS.factor * 3600.0
    )


def test_a_beat_is_seen_from_outside(tmp_path: Path) -> None:
    path, clock = tmp_path / "a.beat", Clock()
    bench = Bench(path)
    watch = BeatWatch(path, 2.0, clock)
    for _ in range(10):
        clock.now += 1.0
        quiet = watch.quiet()
    assert quiet == 10.0, "it never was there"
    for number in range(5):
        bench.watchdog.look()
        os.utime(path, ns=(number, number))  # however coarse the file system's times are
        clock.now += 1.0
        assert watch.quiet() == 0.0
    for _ in range(100):
        clock.now += 3600.0  # the watcher slept
        quiet = watch.quiet()
    assert quiet == 200.0
