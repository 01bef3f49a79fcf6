"""One self-contained HTML page: loss curves, acceptance, speed, samples. No script, no network."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from outrider.benchmarks.charts import acceptance_chart, loss_chart, speed_chart
from outrider.console import count
from outrider.errors import OutriderError
from outrider.files import write_text_atomic
from outrider.training.telemetry import METRICS, read_metrics

SAMPLES_SHOWN = 6
_BENCHMARK_KEYS = ("provenance", "plain", "draft", "speedup", "identical", "prompts", "comparable", "results")
_CSS = """
:root { --ink: #1c2430; --paper: #fff; --line: #d8dee6; --card: #f6f8fa; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--ink); background: var(--paper); color-scheme: light; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem .25rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; } tr { border-bottom: 1px solid var(--line); }
pre { background: var(--card); padding: .8rem; overflow-x: auto; white-space: pre-wrap; font-size: .85rem; }
.hit { color: #0b6e4f; font-weight: 600; } small { color: #5b6675; }
"""


def write_report(output: str | Path, runs: list[str | Path], benchmarks: list[str | Path],
                 title: str = "Outrider report") -> Path:
    """Write the page.

    Args:
        output: the `.html` file.
        runs: run folders with `metrics.jsonl`.
        benchmarks: JSON files of `outrider bench decode --json`.
        title: heading.

    Raises:
        OutriderError: an input is missing or of another kind, or there is none.
    """
    if not runs and not benchmarks:
        raise OutriderError("nothing to report: give run folders or benchmark files")
    curves = {name: _metrics(path) for name, path in _named([Path(run) for run in runs]).items()}
    results = {name: _benchmark(path) for name, path in _named([Path(path) for path in benchmarks]).items()}
    sections = [f"<h1>{escape(title)}</h1>"]
    if curves:
        sections += _training_sections(curves)
    if results:
        sections += _decoding_sections(results)
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_CSS}</style></head><body>{''.join(sections)}</body></html>\n")
    write_text_atomic(Path(output), page)
    return Path(output)


def _training_sections(curves: dict[str, list[dict[str, Any]]]) -> list[str]:
    losses = {name: ([r["tokens"] for r in records if "loss" in r], [r["loss"] for r in records if "loss" in r])
              for name, records in curves.items()}
    scores = {name: [r for r in records if "bits_per_byte" in r] for name, records in curves.items()}
    sections = ["<h2>Training</h2>", loss_chart(losses, "training loss, nats per token")]
    scored = {name: ([r["tokens"] for r in rs], [r["bits_per_byte"] for r in rs])
              for name, rs in scores.items() if len(rs) > 1}
    if scored:
        sections.append(loss_chart(scored, "held-out bits per byte"))
    rows = []
    for name, records in curves.items():
        steps = [r for r in records if "loss" in r]
        last = scores[name][-1] if scores[name] else None
        if steps:
            rows.append([name, count(steps[-1]["tokens"]), f"{steps[-1]['loss']:.3f}",
                         f"{last['bits_per_byte']:.3f}" if last else "", count(steps[-1]["tokens_per_second"])])
    sections.append(_table(["run", "tokens", "last loss", "held-out bits per byte", "tokens/s"], rows))
    return sections


def _decoding_sections(results: dict[str, dict[str, Any]]) -> list[str]:
    sections = ["<h2>Decoding with a draft</h2>", speed_chart({
        name: (r["plain"]["tokens_per_second"], r["draft"]["tokens_per_second"]) for name, r in results.items()})]
    sections.append(_table(
        ["benchmark", "alone, tokens/s", "with draft, tokens/s", "speed-up", "acceptance rate",
         "mean accepted length", "same output"],
        [[name, f"{r['plain']['tokens_per_second']:.1f}", f"{r['draft']['tokens_per_second']:.1f}",
          f"{r['speedup']:.2f}x", _share(r["draft"]["acceptance_rate"]), f"{r['draft']['mean_accepted_length']:.2f}",
          f"{r['identical']} of {r['prompts']}" if r["comparable"] else "same law, sampled"]
         for name, r in results.items()]))
    acceptance = {name: r["draft"]["acceptance_per_position"] for name, r in results.items()
                  if r["draft"]["acceptance_per_position"]}
    if acceptance:
        sections += ["<h2>Acceptance by place in the proposal</h2>", acceptance_chart(acceptance)]
    for name, result in results.items():
        sections.append(f"<h2>Samples: {escape(name)}</h2>")
        for sample in result["results"][:SAMPLES_SHOWN]:
            sections.append(f"<pre>{escape(sample['prompt'])}<span class=hit>{escape(sample['text'])}</span></pre>")
        origin = result["provenance"]
        sections.append(f"<p><small>{escape(origin.get('date', ''))} on {escape(origin.get('device', ''))}, "
                        f"torch {escape(origin.get('torch', ''))}: <code>{escape(origin.get('command', ''))}</code>"
                        "</small></p>")
    return sections


def _table(head: list[str], rows: list[list[str]]) -> str:
    def cells(tag: str, values: list[str]) -> str:
        return "".join(f"<{tag}>{escape(value)}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', head)}</tr>{body}</table>"


def _share(value: float | None) -> str:
    return "none drafted" if value is None else f"{100 * value:.1f} %"


def _named(paths: list[Path]) -> dict[str, Path]:
    """Give each input a name of its own: the last part of its path, numbered where two share it."""
    names: dict[str, Path] = {}
    for path in paths:
        stem = path.stem if path.suffix == ".json" else path.name
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem} ({number})"
        names[name] = path
    return names


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / METRICS if run.is_dir() else run
    if not path.is_file():
        raise OutriderError(f"{run} is not a run folder: it has no {METRICS}")
    try:
        records = read_metrics(path)
    except UnicodeDecodeError as error:
        raise OutriderError(f"{path} is not a metrics log: it is not text") from error
    if not any("loss" in record for record in records):
        raise OutriderError(f"{path} holds no training steps yet")
    return records


def _benchmark(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OutriderError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise OutriderError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict) or value.get("format") != "outrider-decode-benchmark":
        raise OutriderError(f"{path} was not written by 'outrider bench decode --json'")
    if missing := [key for key in _BENCHMARK_KEYS if key not in value]:
        raise OutriderError(f"{path} is damaged: it lacks '{missing[0]}'; run the benchmark again")
    return value
