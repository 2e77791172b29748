"""Progress: sparse plain lines for a file, one live line on a terminal, nothing on other ranks."""

from __future__ import annotations

import io
import re

import pytest

from fedsim.record.progress import Progress, elapsed, figure


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_plain_lines_come_at_most_every_five_seconds_and_at_the_end(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock=clock)
    progress.round(2, 8)
    with progress.phase("train", total=60, unit="steps") as phase:
        for step in range(1, 61):
            clock.now += 0.25
            phase.update(step, loss=1.5)
    assert stream.getvalue().splitlines() == [
        "[00:00:05] round 3/8 · train · 20/60 steps · 5.0 s · loss 1.5",
        "[00:00:10] round 3/8 · train · 40/60 steps · 10.0 s · loss 1.5",
        "[00:00:15] round 3/8 · train · 60/60 steps · 15.0 s · loss 1.5",
    ]


def test_the_end_of_a_part_is_shown_and_the_end_of_the_phase_once(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream, clock=clock).phase("evaluate", unit="batches") as phase:
        for done, total in ((14, 28), (28, 28), (1, 2), (2, 2)):
            clock.now += 6.0
            phase.step(done, total)
        clock.now += 1.0
    assert stream.getvalue().splitlines() == [
        "[00:00:06] evaluate · 14/28 batches · 6.0 s",
        "[00:00:12] evaluate · 28/28 batches · 12.0 s",
        "[00:00:18] evaluate · 1/2 batches · 18.0 s",
        "[00:00:25] evaluate · 2/2 batches · 25.0 s",
    ]


def test_an_error_after_the_last_step_is_shown_once_too(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(stream, clock=clock).phase("train", 4) as phase:
        clock.now += 6.0
        phase.update(4)
        raise RuntimeError
    assert stream.getvalue() == "[00:00:06] train · 4/4 · 6.0 s · stopped\n"


def test_a_short_phase_is_one_line(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(stream, clock=clock)
    with progress.phase("aggregate"):
        clock.now += 0.3
    progress.round(0, 8)
    progress.outside_rounds()
    progress.note("guard verdicts reused", num_rows=2000, hmean=64.123456)
    assert stream.getvalue().splitlines() == [
        "[00:00:00] aggregate · 0.3 s",
        "[00:00:00] guard verdicts reused · num rows 2000, hmean 64.12",
    ]


def test_step_learns_the_total_on_the_way(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stream, clock=clock).phase("filter", unit="batches") as phase:
        phase.step(3, 7, part="guard")
        assert phase.total == 7
    assert stream.getvalue() == "[00:00:00] filter · 3/7 batches · 0.0 s · part guard\n"


def test_an_error_is_seen_on_the_phase_line_and_passes_through(clock: Clock) -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Progress(stream, clock=clock).phase("train", 4) as phase:
        phase.update(1)
        raise RuntimeError
    assert stream.getvalue() == "[00:00:00] train · 1/4 · 0.0 s · stopped\n"


def test_a_terminal_gets_one_line_that_is_redrawn(clock: Clock) -> None:
    stream = Terminal()
    progress = Progress(stream, live_every_s=0.125, clock=clock)
    with progress.phase("train", total=100) as phase:
        for step in range(1, 101):
            clock.now += 0.0625
            phase.update(step)
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("100/100 · 6.2 s\n")
    assert text.count("\r\x1b[2K") == 50 + 2  # every second step, and both ends


def test_a_live_line_never_wraps(clock: Clock) -> None:
    stream = Terminal()
    with Progress(stream, clock=clock).phase("x" * 200) as phase:
        clock.now += 1.0
        phase.update(1)
    live = re.split(r"\r\x1b\[2K", stream.getvalue())[1:-1]
    assert live and all(len(line) < 80 for line in live)


def test_header_lines_up_its_values() -> None:
    stream = io.StringIO()
    Progress(stream).header("fedsim 0.1.0", {"run": "demo", "processes": 4})
    assert stream.getvalue() == "fedsim 0.1.0\n  run        demo\n  processes  4\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_print_nothing(stream: io.StringIO) -> None:
    progress = Progress(stream, enabled=False, every_s=0.0, live_every_s=0.0)
    progress.header("title", {})
    progress.note("note")
    with progress.phase("train", 2) as phase:
        phase.update(1)
        phase.step(2, 2)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.0, "00:00:00"), (61.9, "00:01:01"), (3600 * 30 + 59, "30:00:59")])
def test_elapsed(seconds: float, text: str) -> None:
    assert elapsed(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(3, "3"), (1.0, "1"), (0.000123456, "0.0001235"), (15234.7, "15235"), ("red", "red")]
)
def test_figure(value: float | int | str, text: str) -> None:
    assert figure(value) == text
