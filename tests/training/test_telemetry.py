"""The metrics log: its schema, cutting it back on resume, and TensorBoard when it is there and when not."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from outrider.devices import peak_flops, pick_device
from outrider.errors import MissingExtraError
from outrider.model import ModelConfig
from outrider.recipe import Recipe
from outrider.training import train
from outrider.training.snapshots import SnapshotStore
from outrider.training.telemetry import METRICS, MetricsLog, Speedometer, read_metrics
from tests.conftest import tiny_config


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_schema_of_a_run(recipe_file: Path) -> None:
    result = train(Recipe.load(recipe_file, ["evaluation.every=5"]))
    records = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    scores = [record for record in records if "loss" not in record]
    assert [record["step"] for record in steps] == list(range(1, 11))
    for record in steps:
        assert {key: type(value) for key, value in record.items()} == {
            "step": int, "tokens": int, "loss": float, "learning_rate": float, "gradient_norm": float,
            "tokens_per_second": float, "mfu": float, "epoch": int, "window": int, "seconds": float}
        assert record["tokens_per_second"] > 0
        assert record["gradient_norm"] > 0
    assert [record["step"] for record in scores] == [5, 10]
    for record in scores:
        assert {key: type(value) for key, value in record.items()} == {
            "step": int, "tokens": int, "validation_loss": float, "bits_per_byte": float,
            "validation_tokens": int}
    seconds = [record["seconds"] for record in steps]
    assert seconds == sorted(seconds)
    assert [record["step"] for record in records] == sorted(record["step"] for record in records)


def test_mfu_is_the_share_of_the_measured_peak(recipe_file: Path) -> None:
    """6 x matmul parameters + 12 x layers x width x context, over the peak of this device."""
    record = read_metrics(train(Recipe.load(recipe_file)).metrics)[3]
    shape: ModelConfig = tiny_config()
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 300 * 32
    assert shape.num_matmul_parameters == matrices
    peak = peak_flops(pick_device("auto"), "fp32")
    assert peak is not None
    flops = 6 * matrices + 12 * 2 * 32 * 64
    assert record["mfu"] == pytest.approx(record["tokens_per_second"] * flops / peak, rel=1e-3)


def write(path: Path, steps: range, tail: str = "") -> list[dict[str, Any]]:
    records = [{"step": step, "loss": 1 / step} for step in steps]
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return records


@pytest.mark.parametrize("tail", ["", '{"step": 6, "lo', '{"step": 6, "loss": 0.1', "\0\0\0", '{"step"'])
@pytest.mark.parametrize("after", [1, 3, 5, 9])
def test_resuming_cuts_the_log_back(tmp_path: Path, after: int, tail: str) -> None:
    records = write(tmp_path / METRICS, range(1, 6), tail)
    with MetricsLog(tmp_path, continue_after=after) as log:
        log.write({"step": 99, "loss": 0.5})
    kept = [record for record in records if record["step"] <= after]
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [*kept, {"step": 99, "loss": 0.5}]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_every_cut_of_the_last_line_is_ignored(tmp_path: Path) -> None:
    """A kill can end the file after any byte."""
    records = write(tmp_path / METRICS, range(1, 4))
    text = (tmp_path / METRICS).read_text()
    last = len(text) - len(text.splitlines(keepends=True)[-1])
    for end in range(last, len(text) + 1):
        (tmp_path / METRICS).write_text(text[:end])
        whole = 3 if end >= len(text) - 1 else 2  # only the newline may lack
        assert read_metrics(tmp_path / METRICS) == records[:whole], end


def test_a_new_log_starts_empty_and_lines_are_there_at_once(tmp_path: Path) -> None:
    write(tmp_path / METRICS, range(1, 6))
    with MetricsLog(tmp_path, continue_after=None) as log:
        assert log.path.read_text() == ""
        log.write({"step": 1})
        assert read_metrics(log.path) == [{"step": 1}]


def test_resuming_without_a_log_begins_one(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "new", continue_after=7) as log:
        log.write({"step": 8})
    assert read_metrics(tmp_path / "new" / METRICS) == [{"step": 8}]


def test_speed_is_of_recent_steps_and_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("outrider.training.telemetry.time.perf_counter", lambda: clock[0])
    speed = Speedometer()
    for _ in range(30):
        clock[0] += 2.0
        assert speed.add(50) == pytest.approx(25.0)
    clock[0] += 1_000.0  # an evaluation
    speed.pause(1_000.0)
    clock[0] += 2.0
    assert speed.add(50) == pytest.approx(25.0)
    for _ in range(100):  # later, four times as fast: what was long ago is forgotten
        clock[0] += 0.5
        speed.add(50)
    clock[0] += 0.5
    assert speed.add(50) == pytest.approx(100.0)


class Writer:
    """Stands in for TensorBoard's SummaryWriter."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, key: str, value: float, step: int) -> None:
        self.scalars.append((key, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_the_same_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made.clear()
    with MetricsLog(tmp_path, continue_after=4, tensorboard=True) as log:
        log.write({"step": 5, "loss": 0.25, "mfu": None})
    (writer,) = Writer.made
    assert writer.scalars == [("loss", 0.25, 5)]
    assert writer.purge_step == 4
    assert writer.closed
    assert Path(writer.folder).parent == tmp_path


@pytest.fixture
def no_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without it: None makes the import fail."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.mark.usefixtures("no_tensorboard")
def test_missing_tensorboard_is_one_line(recipe_file: Path) -> None:
    with pytest.raises(MissingExtraError) as caught:
        train(Recipe.load(recipe_file, ["logging.tensorboard=true"]))
    message = str(caught.value)
    assert "outrider[tensorboard]" in message
    assert "\n" not in message


@pytest.mark.usefixtures("no_tensorboard")
def test_missing_tensorboard_does_not_leave_half_a_run(recipe_file: Path) -> None:
    """Once the setting is off, the same command must work."""
    with pytest.raises(MissingExtraError):
        train(Recipe.load(recipe_file, ["logging.tensorboard=true"]))
    assert train(Recipe.load(recipe_file)).steps == 10


@pytest.mark.usefixtures("no_tensorboard")
def test_missing_tensorboard_leaves_earlier_results(tmp_path: Path, recipe_file: Path) -> None:
    train(Recipe.load(recipe_file))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    recipe = Recipe.load(recipe_file, ["logging.tensorboard=true"])
    for resume in (False, True):
        with pytest.raises(MissingExtraError):
            train(recipe, resume=resume, replace=not resume, warn=lambda line: None)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    after.pop(tmp_path / "run" / "recipe.json")
    before.pop(tmp_path / "run" / "recipe.json")
    assert after == before
    assert SnapshotStore(tmp_path / "run" / "snapshots").list()
