"""The trace of a service that runs for months."""

from types import SimpleNamespace
from typing import Any

import pytest

from wanduet.engine.trace import Trace


def test_only_the_newest_spans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.engine.trace.MAX_SPANS", 10)
    trace = Trace()
    for number in range(95):
        job: Any = SimpleNamespace(id=str(number))
        with trace.span("denoise", job):
            pass
        assert len(trace.spans) < 20
    assert [span.job for span in trace.spans[-10:]] == [str(number) for number in range(85, 95)]
