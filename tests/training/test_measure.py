"""What measurements.json says of a run: steps without what came between them, memory in GiB."""

from types import SimpleNamespace

from fitune.training import measure
from fitune.training.measure import Measurements, process_peaks


def test_a_step_counts_neither_the_save_nor_the_evaluation_before_it(monkeypatch, tmp_path):
    """Nor is the first counted, which compiles."""
    clock = SimpleNamespace(now=0.0, tokens=0)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    measured = Measurements(tmp_path, {})
    measured.tokens_so_far = lambda: clock.tokens

    def step(seconds: float) -> None:
        clock.now += seconds
        clock.tokens += 100
        measured.on_step_end(None, None, None)

    step(60)
    step(2)
    for event in (measured.on_evaluate, measured.on_save):
        clock.now += 1000
        event(None, None, None)
        step(2)
    step(4)
    assert measured.steps == [(2, 100), (2, 100), (2, 100), (4, 100)]
    assert measured._tokens_per_second() == 50, "the median step's"


def test_peaks_are_in_gib(monkeypatch):
    monkeypatch.setattr(measure.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**20))  # KiB
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure.torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(measure.torch.cuda, "max_memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr(measure.torch.cuda, "max_memory_reserved", lambda: 6 * 2**30)
    assert process_peaks() == {"peak_allocated_gib": 5.0, "peak_reserved_gib": 6.0, "peak_host_rss_gib": 3.0}
