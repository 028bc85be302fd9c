"""Reading ahead: what is in flight, and in which order it is used."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from patience import PATIENCE_SECONDS

from fitune.errors import FituneError
from fitune.weights import streaming
from fitune.weights.streaming import Read, stream


class Disk:
    """A checkpoint whose reads take as long as `seconds` says and give as many bytes of their number."""

    def __init__(self, seconds: dict[int, float], meet: tuple[set[int], int] = (frozenset(), 0)):
        """Of the reads in `meet` none ends before so many of them are in flight at once."""
        self.seconds, self.lock = seconds, threading.Lock()
        self.meet, self.met = meet, threading.Event()
        self.in_flight: set[int] = set()
        self.together: list[set[int]] = []
        "Which reads were in flight when one began."

    def read_bytes(self, source: str, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        number = int(source)
        with self.lock:
            self.in_flight.add(number)
            self.together.append(set(self.in_flight))
            if len(self.in_flight & self.meet[0]) >= self.meet[1]:
                self.met.set()
        if number in self.meet[0]:
            self.met.wait(10)
        time.sleep(self.seconds.get(number, 0))
        with self.lock:
            self.in_flight.remove(number)
        return out.fill_(number)


def test_steps_are_used_in_their_order_whatever_read_ends_first():
    used, counted = [], []
    straight = torch.zeros(3, dtype=torch.uint8)
    steps = [
        Read("0", 0, 5, consume=lambda data: used.append(data.tolist())),
        lambda: used.append("after 0"),
        Read("1", 0, 2, consume=lambda data: used.append(data.tolist())),
        Read("2", 0, 3, destination=straight),
        lambda: used.append(straight.tolist()),
    ]
    stream(Disk({0: 0.2, 2: 0.1}), steps, pin_memory=False, on_step=lambda: counted.append(len(used)))
    assert used == [[0] * 5, "after 0", [1] * 2, [2] * 3]
    assert counted == [1, 2, 3, 3, 4]


def test_many_small_reads_leave_buffers_filling_and_no_more_than_there_are(monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK_BYTES", 8)
    big = list(range(0, 60, 6))
    kept = [torch.empty(1, dtype=torch.uint8) for _ in range(60)]
    steps = [
        Read(str(number), 0, 8, consume=lambda data: None)
        if number in big
        else Read(str(number), 0, 1, destination=kept[number])
        for number in range(60)
    ]
    disk = Disk({}, meet=(set(big), streaming.READ_BUFFERS))
    stream(disk, steps, pin_memory=False)
    buffered = [len(together & set(big)) for together in disk.together]
    assert max(buffered) == streaming.READ_BUFFERS
    assert all(kept[number].item() == number for number in range(60) if number not in big)


def test_a_call_behind_a_read_waits_for_no_later_step():
    """Ranks meet in such calls: one that waited in the generator for the others would hang with them."""
    called = []

    def steps():
        for number in range(20):
            yield Read(str(number), 0, 1, consume=lambda data: None)
            yield lambda number=number: called.append(number)
            in_flight = streaming.READ_BUFFERS - 1
            assert len(called) >= number + 1 - in_flight

    stream(Disk({}), steps(), pin_memory=False)
    assert called == list(range(20))


def test_a_read_that_fails_ends_the_stream_and_what_was_to_be_read(monkeypatch):
    """The reads behind it take until the stream ends: none of those that had not begun by then begins any more."""
    ended = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            ended.set()
            super().shutdown(wait=wait)

    class Damaged(Disk):
        def read_bytes(self, source, *rest):
            if source == "1":
                raise FituneError("file ends early")
            if source != "0":
                ended.wait(PATIENCE_SECONDS)
            return super().read_bytes(source, *rest)

    monkeypatch.setattr(streaming, "ThreadPoolExecutor", Pool)
    disk, used, kept = Damaged({}), [], torch.empty(60, dtype=torch.uint8)
    steps = [Read("0", 0, 1, consume=lambda data: used.append(data.item()))]
    steps += [Read(str(number), 0, 1, destination=kept[number : number + 1]) for number in range(1, 60)]
    with pytest.raises(FituneError, match="file ends early"):
        stream(disk, steps, pin_memory=False)
    assert used == [0]
    assert len(disk.together) <= 2 * streaming.THREADS
