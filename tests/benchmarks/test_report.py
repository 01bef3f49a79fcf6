"""The report: one page that fetches nothing and shows text as text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from outrider.benchmarks.decode import DecodeBenchmark, PromptResult
from outrider.benchmarks.report import write_report
from outrider.decoding import Statistics
from outrider.errors import OutriderError

NASTY = "<script>alert('x')</script> & \"quoted\" </pre><img src=x onerror=y> \u00e9 \U0001f642"
ORIGIN = {"command": "outrider bench decode --json <out>", "date": "2026-01-01T00:00:00+00:00",
          "device": "Some <CPU>", "torch": "2.13.0"}


def statistics(seconds: float, drafted: int = 0, accepted: int = 0) -> Statistics:
    result = Statistics(generated=40, total_seconds=seconds)
    for _ in range(5):
        result.record_round(drafted, accepted)
    return result


def benchmark_file(folder: Path, name: str = "bench", *, prompt: str = "def f():", text: str = "    return 1",
                   drafted: int = 4, accepted: int = 3, **changes: Any) -> Path:
    """A file as `outrider bench decode --json` writes it, with keys replaced by `changes`."""
    result = PromptResult(prompt, [1], [1], [10.0], [25.0], text, [False])
    plain, draft = statistics(10.0), statistics(4.0, drafted, accepted)
    benchmark = DecodeBenchmark([result], plain, draft, True, ORIGIN, {})
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**benchmark.dump(), **changes}))
    return path


def run_folder(folder: Path, name: str = "run", records: list[dict[str, Any]] | None = None) -> Path:
    """A run's folder with the metrics of a short training."""
    steps = [{"step": n, "tokens": 1_000 * n, "loss": 5.0 - 0.5 * n, "tokens_per_second": 900.0}
             for n in range(1, 6)]
    scores = [{"step": n, "tokens": 1_000 * n, "bits_per_byte": 3.0 - 0.25 * n} for n in (2, 4, 5)]
    place = folder / name
    place.mkdir()
    lines = records if records is not None else sorted(steps + scores, key=lambda record: record["step"])
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


class Page(HTMLParser):
    """Everything on a page that could make a browser fetch or run something, and the text it shows."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._open.append(tag)
        if tag == "pre":
            self.texts.setdefault("pre", []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "pre" in self._open:
            self.texts["pre"][-1] += data
        elif self._open:
            self.texts.setdefault(self._open[-1], []).append(data)


def everything(folder: Path) -> Path:
    runs = [run_folder(folder, "target"), run_folder(folder, "draft")]
    benchmarks = [benchmark_file(folder, "a"), benchmark_file(folder, "b", drafted=0, accepted=0)]
    return write_report(folder / "report.html", [*runs], [*benchmarks], "My report")


def test_one_page_with_all_that_was_measured(tmp_path: Path) -> None:
    path = everything(tmp_path)
    page = Page(path)
    assert path == tmp_path / "report.html"
    assert page.tags.count("html") == page.tags.count("body") == 1
    assert page.tags.count("svg") == 4, "loss, held-out score, speed, acceptance"
    text = path.read_text(encoding="utf-8")
    for shown in ("My report", "target", "draft", "2.50x", "75.0 %", "none drafted", "1 of 1", "def f():",
                  "2026-01-01", "2.13.0"):
        assert shown in text, shown
    files = sorted(file.name for file in tmp_path.iterdir() if file.is_file())
    assert files == ["a.json", "b.json", "report.html"], "one file is written"


def test_nothing_is_fetched_or_run(tmp_path: Path) -> None:
    path = everything(tmp_path)
    page, text = Page(path), path.read_text(encoding="utf-8")
    for tag in ("script", "link", "img", "iframe", "object", "embed", "base", "image", "video"):
        assert tag not in page.tags, tag
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), f"{tag} has a handler"
        if name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            assert value.startswith("#"), f"{tag} {name}={value}"
        for target in re.findall(r"url\(([^)]*)\)", value):
            assert target.strip("'\"").startswith("#"), f"{tag} {name}={value}"
        assert not (tag == "meta" and name == "http-equiv")
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.strip("'\"").startswith("#"), target
    assert "@import" not in text
    assert "<?xml" not in text
    assert "<!DOCTYPE svg" not in text


def test_text_is_shown_as_text(tmp_path: Path) -> None:
    """Prompt, output, title, provenance and names may hold anything; none of it becomes markup."""
    plain = Page(write_report(tmp_path / "plain.html", [run_folder(tmp_path)], [benchmark_file(tmp_path)]))
    (tmp_path / "deep").mkdir()
    path = benchmark_file(tmp_path / "deep", "a <b> & 'c'", prompt=NASTY, text=f"\n{NASTY}\n",
                          provenance=dict.fromkeys(ORIGIN, NASTY))
    run = run_folder(tmp_path, "run <i> & more")
    page = Page(write_report(tmp_path / "nasty.html", [run], [path], NASTY))
    assert not {"script", "img", "b", "i"} & set(page.tags)
    assert sorted(set(page.tags)) == sorted(set(plain.tags))
    assert page.texts["pre"] == [f"{NASTY}\n{NASTY}\n"]
    assert page.texts["title"] == page.texts["h1"] == [NASTY]
    assert NASTY in "".join(page.texts["code"])


@pytest.mark.parametrize("name", ["a$b$", "$x_$y", "_hidden", "50%", "a_b", "a\\b", "\u00e9 \u4f60"])
def test_any_name_can_stand_in_a_chart(tmp_path: Path, name: str) -> None:
    """A `$` is no formula and a leading `_` hides nothing."""
    run, benchmark = run_folder(tmp_path, name), benchmark_file(tmp_path, name)
    path = write_report(tmp_path / "report.html", [run], [benchmark])
    shown = "".join(Page(path).texts["text"])
    # Once in the legend of each of: loss, held-out score, acceptance; and beside the bars.
    assert shown.count(name) == 4


@pytest.mark.parametrize("runs", [0, 1, 7])
def test_any_number_of_runs_and_benchmarks(tmp_path: Path, runs: int) -> None:
    folders = [run_folder(tmp_path, f"run{index}") for index in range(runs)]
    files = [benchmark_file(tmp_path, f"bench{index}") for index in range(7 - runs)]
    text = write_report(tmp_path / "report.html", [*folders], [*files]).read_text()
    for path in (*folders, *files):
        assert path.stem in text


@pytest.mark.parametrize("names", [("final",) * 3, ("final (2)", "final", "final")])
def test_inputs_of_the_same_name_are_all_shown(tmp_path: Path, names: tuple[str, ...]) -> None:
    """runs/a/final and runs/b/final are two runs, whatever a third one is called."""
    files, folders = [], []
    for index, name in enumerate(names):
        place = tmp_path / str(index)
        place.mkdir()
        files.append(benchmark_file(place, name, prompt=f"prompt number {index}"))
        folders.append(run_folder(place, name, [
            {"step": 1, "tokens": 10, "loss": 1.125 + index, "tokens_per_second": 1.0}]))
    text = write_report(tmp_path / "report.html", [*folders], [*files]).read_text()
    for index in range(len(names)):
        assert f"prompt number {index}" in text
        assert f"{1.125 + index:.3f}" in text


def test_a_run_without_scores(tmp_path: Path) -> None:
    run = run_folder(tmp_path, "run", [{"step": 1, "tokens": 10, "loss": 1.5, "tokens_per_second": 9.0}])
    page = Page(write_report(tmp_path / "report.html", [run], []))
    assert page.tags.count("svg") == 1


def wrong_inputs(place: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    (place / "text.json").write_text("not JSON")
    (place / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (place / "list.json").write_text("[]")
    (place / "other.json").write_text('{"format": "something else"}')
    whole = json.loads(benchmark_file(place, "whole").read_text())
    for key in ("plain", "results", "provenance", "speedup"):
        (place / f"no {key}.json").write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
    (place / "empty").mkdir()
    (place / "binary").mkdir()
    (place / "binary" / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    run_folder(place, "no steps", [{"step": 1, "tokens": 1, "bits_per_byte": 2.0}])
    run_folder(place, "numbers", [1, 2])  # type: ignore[list-item]
    cases: dict[str, tuple[list[Path], list[Path]]] = {"nothing": ([], [])}
    for name in ("missing.json", "text.json", "bytes.json", "list.json", "other.json", "empty",
                 *(f"no {key}.json" for key in ("plain", "results", "provenance", "speedup"))):
        cases[f"benchmark {name}"] = ([], [place / name])
    for name in ("missing", "empty", "binary", "no steps", "numbers"):
        cases[f"run {name}"] = ([place / name], [])
    return cases


@pytest.mark.parametrize("case", [
    "nothing", "benchmark missing.json", "benchmark text.json", "benchmark bytes.json", "benchmark list.json",
    "benchmark other.json", "benchmark empty", "benchmark no plain.json", "benchmark no results.json",
    "benchmark no provenance.json", "benchmark no speedup.json", "run missing", "run empty", "run binary",
    "run no steps", "run numbers",
])
def test_wrong_inputs_are_one_line_and_leave_the_page_as_it_was(tmp_path: Path, case: str) -> None:
    runs, benchmarks = wrong_inputs(tmp_path)[case]
    page = tmp_path / "report.html"
    page.write_text("an earlier report")
    with pytest.raises(OutriderError) as caught:
        write_report(page, [*runs], [*benchmarks])
    message = str(caught.value)
    assert "\n" not in message
    for path in (*runs, *benchmarks):
        assert str(path) in message, "says which"
    assert page.read_text() == "an earlier report"
