"""Encodes a video in segments, each from a keyframe on and with an encoder of its own.

A segment's last frames are encoded while the next segment takes frames. At the end of a video only its last segment is
unfinished, and an encoder with many frames at once (a decode in strips) has twice the threads. Segments begin where a
single encoder would put a keyframe too, so that the same frames give the same bytes on every machine.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from wanduet.errors import OutputError

MakeContext = Callable[[], Any]  # of an opened `av.VideoCodecContext`


class SegmentEncoder:
    """Encodes frames to the packets of one stream, in order. At most two encoders exist at a time."""

    def __init__(self, first: Any, more: MakeContext, length: int) -> None:
        """`first`: the codec context of the first segment; `more`: makes one for each further segment, with the same
        settings; `length`: frames of a segment."""
        self._first, self._more, self._length = first, more, length
        self._context: Any = first
        self._count = 0
        self._packets: list[Any] = []  # of the segment that takes frames
        self._ending: Future[list[Any]] | None = None  # all packets of the segment before
        self._given = 0  # packets, one a frame
        self._first_dts = 0
        self._pool = ThreadPoolExecutor(1, "wanduet-video-segment")

    def encode(self, picture: Any) -> Iterator[Any]:
        """Add a frame with its timestamp; yield the packets that are ready and come next in the file."""
        if self._count == self._length:
            yield from self._end_segment()
        self._count += 1
        self._packets += self._context.encode(picture)
        if self._ending is None or self._ending.done():
            yield from self._ready()

    def finish(self) -> Iterator[Any]:
        """Yield all remaining packets. No frame may be added afterwards."""
        self._packets += self._context.encode(None)  # the segment before is being finished meanwhile
        yield from self._ready()
        self._pool.shutdown()

    def discard(self) -> None:
        """Wait for the thread, whose result is not needed. May be called in any state."""
        self._pool.shutdown(cancel_futures=True)

    def _end_segment(self) -> Iterator[Any]:
        """Let a thread finish the segment, and begin another one."""
        if self._ending is not None:
            yield from self._ready()
        self._ending = self._pool.submit(_finished, self._context, self._packets)
        self._context, self._packets, self._count = self._more(), [], 0
        if self._context.extradata != self._first.extradata:
            raise OutputError("The video encoder's segments have different headers.", hint="Try another --codec.")

    def _ready(self) -> Iterator[Any]:
        packets, self._packets = self._packets, []
        if self._ending is not None:
            packets = self._ending.result() + packets
            self._ending = None
        for packet in packets:
            if self._given == 0:
                self._first_dts = packet.dts
            elif self._given >= self._length:
                # A short segment has less reordering, so its encoder begins later: players would see a pause.
                packet.dts = self._first_dts + self._given
            self._given += 1
            yield packet


def _finished(context: Any, packets: list[Any]) -> list[Any]:
    return [*packets, *context.encode(None)]
