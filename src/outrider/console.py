"""What a person sees while work goes on: a live bar in a terminal, plain lines elsewhere.

Everything goes to standard error, so that standard output stays free for results.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

#: Without a terminal a line appears at most this often, in seconds.
PLAIN_INTERVAL = 10.0

console = Console(stderr=True, highlight=False)


class Watcher(Protocol):
    """What long work reports to. `total` may be unknown (None)."""

    def update(self, done: float, total: float | None, note: str) -> None:
        """Say how far the work is; `note` is a short line of figures."""
        ...


class Silent:
    """Reports to nobody."""

    def update(self, done: float, total: float | None, note: str) -> None:
        """Do nothing."""


class Display:
    """Shows one piece of work: a bar with figures in a terminal, else a plain line now and then."""

    def __init__(self, title: str, to: Console | None = None) -> None:
        self.title = title
        self.console = to or console
        self._bar: Progress | None = None
        self._task = None
        self._last_line = 0.0
        self._note = ""

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), _Percentage(),
                TextColumn("{task.fields[note]}"), TimeElapsedColumn(), _Eta(), console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is None and self._note:
            self.console.print(f"[bold]{self.title}[/bold]  {self._note}", soft_wrap=True)

    def update(self, done: float, total: float | None, note: str) -> None:
        """Show progress; see `Watcher`."""
        self._note = note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            share = f"{100 * done / total:3.0f} %  " if total else ""
            self.console.print(f"{self.title}  {share}{note}", soft_wrap=True)


class _Percentage(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.percentage:3.0f} %" if task.total else "")


class _Eta(ProgressColumn):
    def render(self, task: Task) -> Text:
        remaining = task.time_remaining
        return Text(f"{duration(remaining)} left" if remaining is not None else "")


def duration(seconds: float) -> str:
    """Return seconds in the units a person would use: `42 s`, `3 min 20 s`, `5 h 10 min`, `12.0 days`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if seconds < 48 * 3600:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"
    return f"{seconds / 86400:.1f} days"


def count(value: float) -> str:
    """Return a number with a metric suffix: `950`, `1.2k`, `3.40M`, `670.0B`."""
    for divisor, suffix, digits in ((1, "", 0), (1e3, "k", 1), (1e6, "M", 2), (1e9, "B", 1)):
        if round(abs(value) / divisor, digits) < 1000:
            return f"{value / divisor:.{digits}f}{suffix}"
    return f"{value / 1e12:.1f}T"


def size(number: float) -> str:
    """Return bytes with a decimal suffix: `512 B`, `1.5 kB`, `2.1 GB`."""
    for divisor, suffix, digits in ((1, "B", 0), (1e3, "kB", 1), (1e6, "MB", 1), (1e9, "GB", 1)):
        if round(number / divisor, digits) < 1000:
            return f"{number / divisor:.{digits}f} {suffix}"
    return f"{number / 1e12:.2f} TB"
