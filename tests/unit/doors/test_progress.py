"""What is left of a phase and of a batch, by a clock that the test sets."""

from wanduet.doors.cli.progress import Batch, Pace


def test_the_pace_is_that_of_the_latest_steps() -> None:
    pace = Pace("step")
    pace.mark(0, 0.0)
    assert pace.text(50, 1.0) == ""
    for done in range(1, 21):
        pace.mark(done, 60.0 + 10 * done)  # the first step takes a minute longer
        pace.mark(done, 61.0 + 10 * done)  # said twice
    assert pace.text(50, 260.0) == "10 s a step, 5.0 min left"
    assert pace.text(50, 265.0) == "10 s a step, 4.9 min left"
    assert pace.text(20, 260.0) == "10 s a step"


def test_events_that_have_waited_do_not_make_it_look_faster() -> None:
    pace = Pace("step")
    for done in range(5):
        pace.mark(done, 100.0 + done / 1000)
    assert pace.text(8, 100.1) == ""
    pace.mark(5, 110.0)
    assert pace.text(8, 110.0) == "10 s a step, 30 s left"


def test_quick_phases_and_those_without_a_unit() -> None:
    frames, layers = Pace("frame"), Pace(None)
    for pace in (frames, layers):
        pace.mark(4, 10.0)
        pace.mark(8, 11.0)
    assert frames.text(81, 11.0) == "4 frames a second, 18 s left"
    assert layers.text(24, 11.0) == "4 s left"
    assert layers.text(24, 99.0) == "0 s left"


def test_a_batch_corrects_what_was_predicted_by_what_it_took() -> None:
    batch = Batch([100.0, 100.0, 200.0, 100.0], began=0.0)
    assert batch.text(0.0) == "Video 1 of 4, 8.3 min left for all"
    batch.add(False, 1.0)  # made before
    batch.add(True, 201.0)  # twice as long as predicted
    assert 598 <= batch.left(201.0) <= 606
    assert batch.left(301.0) == batch.left(201.0) - 100
    assert batch.text(301.0).startswith("Video 3 of 4, ")
    assert batch.left(9999.0) == 0
