"""What a run says about itself: one JSON line a step, always; TensorBoard and a live display if wished."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from outrider.errors import MissingExtraError, disk_errors
from outrider.files import write_text_atomic

METRICS = "metrics.jsonl"
_SPEED_WINDOW = 20


class MetricsLog:
    """Appends records to `metrics.jsonl` (schema in docs/formats.md) and, optionally, to TensorBoard."""

    def __init__(self, folder: Path, *, continue_after: int | None, finished: bool = False,
                 tensorboard: bool = False) -> None:
        """Open the log.

        Args:
            folder: the run's folder.
            continue_after: keep the lines up to this step and drop later ones, which will be made again;
                None starts a new log.
            finished: every step was taken: the last evaluation will be made again as well.
            tensorboard: also write TensorBoard events.
        """
        self.path = folder / METRICS
        kept = "" if continue_after is None else _lines_until(self.path, continue_after, finished)
        write_text_atomic(self.path, kept)
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            self._board = summary_writer()(str(folder / "tensorboard"), purge_step=continue_after)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError:  # closing tries again to write what would not go
            if kind is None:
                raise
        if self._board is not None:
            self._board.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it has at least `step`."""
        with disk_errors(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        if self._board is not None:
            for key, value in record.items():
                if isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(key, value, record["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics file; an unfinished last line is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if isinstance(record, dict):
            records.append(record)
    return records


def summary_writer() -> Any:
    """Return TensorBoard's writer class; raise `MissingExtraError` where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "logging.tensorboard") from error
    return SummaryWriter


def _lines_until(path: Path, step: int, finished: bool) -> str:
    if not path.is_file():
        return ""
    return "".join(json.dumps(record) + "\n" for record in read_metrics(path)
                   if (at := record.get("step", 0)) < step or (at == step and ("loss" in record or not finished)))


class Speedometer:
    """Tokens per second over the last steps."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int]] = deque([(time.perf_counter(), 0)], maxlen=_SPEED_WINDOW + 1)

    def add(self, tokens: int) -> float:
        """Count a step of `tokens` that ends now; return the recent tokens per second."""
        self._marks.append((time.perf_counter(), self._marks[-1][1] + tokens))
        (begin, before), (end, after) = self._marks[0], self._marks[-1]
        return (after - before) / max(end - begin, 1e-9)

    def pause(self, seconds: float) -> None:
        """Leave `seconds` spent on something else (an evaluation, a snapshot) out of the account."""
        self._marks = deque(((mark + seconds, tokens) for mark, tokens in self._marks), maxlen=_SPEED_WINDOW + 1)
