"""What a person reads: figures at every change of unit, and progress with and without a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

import outrider.console as module
from outrider.console import Display, Silent, count, duration, size


@pytest.mark.parametrize(("seconds", "expected"), [
    (0, "0 s"), (0.4, "0 s"), (1, "1 s"), (42, "42 s"), (59.4, "59 s"), (59.9, "1 min 0 s"),
    (60, "1 min 0 s"), (61, "1 min 1 s"), (200, "3 min 20 s"), (3_599, "59 min 59 s"), (3_600, "1 h 0 min"),
    (18_600, "5 h 10 min"), (86_400, "24 h 0 min"), (48 * 3_600 - 1, "47 h 59 min"), (48 * 3_600, "2.0 days"),
    (12 * 86_400, "12.0 days"), (400 * 86_400, "400.0 days"),
])
def test_durations(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(("value", "expected"), [
    (0, "0"), (1, "1"), (950, "950"), (999, "999"), (999.4, "999"), (999.6, "1.0k"), (1_000, "1.0k"),
    (1_234, "1.2k"), (999_900, "999.9k"), (999_960, "1.00M"), (999_999, "1.00M"), (1_000_000, "1.00M"),
    (3_400_000, "3.40M"), (134_105_856, "134.11M"), (999_990_000, "999.99M"), (999_999_999, "1.0B"),
    (1_000_000_000, "1.0B"), (670_000_000_000, "670.0B"), (999_999_999_999, "1.0T"), (1e12, "1.0T"),
    (12.34e12, "12.3T"), (-950, "-950"), (-1_234, "-1.2k"),
])
def test_counts(value: float, expected: str) -> None:
    assert count(value) == expected


@pytest.mark.parametrize(("number", "expected"), [
    (0, "0 B"), (1, "1 B"), (512, "512 B"), (999, "999 B"), (1_000, "1.0 kB"), (1_536, "1.5 kB"),
    (999_900, "999.9 kB"), (999_960, "1.0 MB"), (1_000_000, "1.0 MB"), (999_999_999, "1.0 GB"),
    (1_000_000_000, "1.0 GB"), (2_145_000_000, "2.1 GB"), (999_999_999_999, "1.00 TB"), (1e12, "1.00 TB"),
    (11e12, "11.00 TB"),
])
def test_sizes(number: float, expected: str) -> None:
    assert size(number) == expected


def plain(width: int = 80) -> tuple[Console, io.StringIO]:
    """A console that is no terminal, as when output goes to a file."""
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=False), out


def test_without_a_terminal_lines_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_INTERVAL", 0.0)
    console, out = plain()
    with Display("tiny", console) as display:
        display.update(1, 4, "step 1/4  loss 5.704")
        display.update(2, None, "step 2")
        display.update(4, 4, "step 4/4  loss 5.1")
    assert out.getvalue().splitlines() == [
        "tiny   25 %  step 1/4  loss 5.704", "tiny  step 2", "tiny  100 %  step 4/4  loss 5.1",
        "tiny  step 4/4  loss 5.1"]
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


def test_without_a_terminal_lines_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of a million steps must not have a million lines: one an interval, and the last figures."""
    clock = [1_000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    console, out = plain()
    with Display("tiny", console) as display:
        for step in range(1, 101):
            display.update(step, 100, f"step {step}")
            clock[0] += module.PLAIN_INTERVAL / 20
    lines = out.getvalue().splitlines()
    assert [line.split()[-1] for line in lines] == ["1", "21", "41", "61", "81", "100"]


def test_a_long_line_stays_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLAIN_INTERVAL", 0.0)
    console, out = plain(width=20)
    with Display("tiny", console) as display:
        display.update(1, 2, "a note that is far longer than the console is wide")
    assert len(out.getvalue().splitlines()) == 2


def test_a_failure_ends_without_final_figures() -> None:
    console, out = plain()

    def work() -> None:
        with Display("tiny", console) as display:
            display.update(1, 2, "halfway")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert "halfway" not in out.getvalue().splitlines()[1:]


def test_in_a_terminal_there_is_a_bar_and_the_last_figures_stay() -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, legacy_windows=False)
    with Display("tiny", console) as display:
        display.update(0, None, "starting")
        display.update(1, 4, "loss 5.7")
        assert display._bar is not None
        display._bar.refresh()
        display.update(4, 4, "loss 4.2")
    shown = re.sub(r"\x1b\[[\d;?]*\w", "", out.getvalue())
    assert "25 %" in shown
    assert shown.splitlines()[-1] == "tiny  loss 4.2"


def test_silence() -> None:
    console, out = plain()
    Silent().update(1, 2, "note")
    with Display("tiny", console):
        pass
    assert out.getvalue() == ""


def test_progress_goes_to_standard_error() -> None:
    """Standard output is for results, which may be piped."""
    assert module.console.stderr
