"""The whole workflow at the size of a coffee break: every step is the one a cluster would run."""

from __future__ import annotations

import ast
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from outrider.benchmarks import DecodeBenchmark, benchmark_decode, write_report
from outrider.console import Display, console, count, duration
from outrider.corpus import Source, Tokenizer, prepare
from outrider.corpus.prepare import is_held_out
from outrider.decoding import Decoder
from outrider.errors import OutriderError
from outrider.evaluation import evaluate_corpus
from outrider.files import write_json
from outrider.recipe import Recipe
from outrider.training import TrainingResult, train
from outrider.training.speed import measured_tokens_per_second

VOCABULARY = 2_048
HELD_OUT = {"text": 0.03, "code": 0.02}
#: The draft is one block, so that a guess costs little (docs/experiments.md has the sizes that were tried).
SHAPES: dict[str, dict[str, Any]] = {
    "target": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 7, "num_attention_heads": 4},
    "draft": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 2},
}
TOKENS = {("target", "text"): 120_000, ("target", "code"): 600_000,
          ("draft", "text"): 200_000, ("draft", "code"): 800_000}
LEARNING_RATE = 5e-3
CONTEXT, BATCH_TOKENS = 256, 2_048
PROMPTS, NEW_TOKENS, REPEATS = 12, 96, 2
#: Seconds kept for everything that is not training: data, scores, decoding, report.
RESERVE = 50.0
#: Machines slow down as well: plan with this share of the speed that was measured.
CAUTION = 0.7
LEAST_SHARE = 0.05
SAMPLES_SHOWN = 2

#: Results by role (target, draft) and stage (text, code).
Runs = dict[tuple[str, str], TrainingResult]


@dataclass(frozen=True)
class QuickstartResult:
    """What was measured, as rows of a table, and what to try next."""

    rows: list[tuple[str, str]]
    next_commands: list[str]
    benchmark: DecodeBenchmark
    report: Path


def run(out: str | Path, *, minutes: float = 5.0) -> QuickstartResult:
    """Prepare, pretrain, fine-tune, score, decode, report; everything goes under `out`.

    Args:
        out: a folder; what an earlier quickstart left there is replaced.
        minutes: training is shortened, on a slow machine, to stay within this.
    """
    started, out = time.perf_counter(), Path(out)
    corpora = _prepare(out)
    budget = _Budget(corpora["code"], minutes, started)
    runs: Runs = {}
    for role in ("target", "draft"):
        for stage in ("text", "code"):
            start = runs[role, "text"].model if stage == "code" else None
            # The draft's last lesson is the target itself: what it will have to guess.
            teacher = runs["target", "code"].model if (role, stage) == ("draft", "code") else None
            share = budget.share(runs)
            runs[role, stage] = _train(_recipe(out, role, stage, corpora[stage], start, teacher, share), stage)
    scores = _score(runs, corpora)
    benchmark = _decode(out, runs)
    _show_samples(benchmark)
    report = write_report(out / "report.html", [result.metrics.parent for result in runs.values()],
                          [out / "held-out-functions.json"], "Outrider quickstart")
    elapsed = time.perf_counter() - started
    return QuickstartResult(_rows(runs, scores, benchmark, report, elapsed), _next(out), benchmark, report)


def _prepare(out: Path) -> dict[str, Path]:
    sources = {"text": "books", "code": "stdlib"}
    with Display("prepare books and standard library") as display:
        texts = (document.text for spec in sources.values() for document in Source(spec).documents())
        display.update(0, None, f"training a vocabulary of {VOCABULARY}")
        tokenizer = Tokenizer.train_bpe(texts, VOCABULARY)
        folders = {}
        for stage, spec in sources.items():
            licence = "public domain" if spec == "books" else "PSF-2.0"
            folders[stage] = out / "data" / stage
            prepare([Source(spec, licence=licence)], folders[stage], tokenizer=tokenizer,
                    validation=HELD_OUT[stage], replace=True, watcher=display)
    return folders


class _Budget:
    """Keeps training within the time there is, whatever the machine."""

    def __init__(self, corpus: Path, minutes: float, started: float) -> None:
        self._minutes, self._end = minutes, started + 60 * minutes - RESERVE
        self._speeds: dict[tuple[str, str], float] = {}
        with Display("how fast is this machine") as display:
            for role, stage in TOKENS:
                recipe = _recipe(Path("unused"), role, stage, corpus, None, None, 1.0)
                speed = self._speeds.get((role, "text")) or measured_tokens_per_second(recipe)
                self._speeds[role, stage] = speed
                display.update(0, None, f"{role} trains at {count(speed)} tokens/s")
        # While the draft learns from the target, the target runs forward: a third of a training step.
        target, draft = self._speeds["target", "code"], self._speeds["draft", "code"]
        self._speeds["draft", "code"] = 1 / (1 / draft + 1 / (3 * target))

    def share(self, runs: Runs) -> float:
        """Return what share of the usual tokens the next stage can have, so that those after it can as well."""
        for (role, stage), result in runs.items():
            self._speeds[role, stage] = result.tokens_per_second
            if stage == "text" and (role, "code") not in runs and role == "target":
                self._speeds[role, "code"] = result.tokens_per_second
        seconds = sum(tokens / self._speeds[key] for key, tokens in TOKENS.items() if key not in runs)
        share = max(LEAST_SHARE, min(1.0, CAUTION * (self._end - time.perf_counter()) / seconds))
        if share < 1:
            console.print(f"training the next model on {100 * share:.0f} % of the usual tokens, to stay within "
                          f"{self._minutes:g} minutes")
        return share


def _recipe(out: Path, role: str, stage: str, corpus: Path, start: Path | None, teacher: Path | None,
            share: float) -> Recipe:
    name = f"{role}-{stage}"
    tokens = max(BATCH_TOKENS, int(TOKENS[role, stage] * share))
    model = {"start_from": str(start)} if start else {
        **SHAPES[role], "vocab_size": VOCABULARY, "max_position_embeddings": 1_024, "tie_word_embeddings": True}
    steps = tokens // BATCH_TOKENS
    return Recipe.build({
        "name": name, "output": str(out / name), "model": model, "data": {"path": str(corpus)},
        "training": {"tokens": tokens, "batch_tokens": BATCH_TOKENS, "context": CONTEXT},
        "optimizer": {"kind": "muon", "lr": LEARNING_RATE},
        "distillation": {"teacher": str(teacher)} if teacher else {},
        # The fine-tune carries the decay; pretraining stays at the stable rate it hands over.
        "schedule": {"kind": "wsd", "warmup": min(20, steps // 4), "decay": 0.5, "final": 0.0} if start else
        {"kind": "constant", "warmup": min(20, steps // 4)},
    }, f"quickstart {name}")


def _train(recipe: Recipe, stage: str) -> TrainingResult:
    verb = "distil" if recipe.distillation.teacher else "fine-tune" if recipe.model.start_from else "pretrain"
    with Display(f"{verb} {recipe.name.removesuffix('-' + stage)} on {stage}") as display:
        return train(recipe, replace=True, watcher=display)


def _score(runs: Runs, corpora: dict[str, Path]) -> dict[tuple[str, str, str], float]:
    """Return held-out bits per byte by role, stage of training, and kind of text."""
    scores = {}
    with Display("score") as display:
        for (role, stage), result in runs.items():
            for kind, corpus in corpora.items():
                scored = evaluate_corpus(result.model, corpus, context=CONTEXT)
                scores[role, stage, kind] = scored.bits_per_byte
                display.update(len(scores), 2 * len(runs), f"{role} after {stage}, {kind}: {scored.bits_per_byte:.3f}")
    return scores


def _decode(out: Path, runs: Runs) -> DecodeBenchmark:
    prompts = held_out_headers(PROMPTS)
    target, draft = (runs[role, "code"].model for role in ("target", "draft"))
    path = out / "held-out-functions.json"
    (out / "prompts.txt").write_text("\n---\n".join(prompts) + "\n", encoding="utf-8")
    with Display("decode held-out functions") as display:
        result = benchmark_decode(Decoder.load(target, draft), prompts, max_new_tokens=NEW_TOKENS, repeats=REPEATS,
                                  settings={"target": str(target), "draft": str(draft)}, watcher=display)
    write_json(path, result.dump())
    return result


def held_out_headers(number: int) -> list[str]:
    """Return signature and docstring of top-level functions of the library that training did not see.

    No header ends in white space: the line break belongs to the token that also holds the indentation.
    """
    headers = []
    for document in Source("stdlib").documents():
        if not is_held_out(document.text, HELD_OUT["code"]):
            continue
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        lines = document.text.splitlines()
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                first = node.body[0]
                end = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
                header = "\n".join(lines[node.lineno - 1:end]).rstrip()
                if len(header) < 400:
                    headers.append(header)
    if not headers:
        raise OutriderError("this Python's library has no held-out function to decode; is its source installed?")
    stride = max(1, len(headers) // number)
    return headers[::stride][:number]


def _show_samples(benchmark: DecodeBenchmark) -> None:
    console.print("\n[bold]samples[/bold] (a few minutes of training: expect the look of Python, not its sense)")
    for result in benchmark.prompts[:SAMPLES_SHOWN]:
        console.print(Text(result.prompt) + Text(result.text, style="green"), soft_wrap=True)
        console.rule(style="dim")


def _rows(runs: Runs, scores: dict[tuple[str, str, str], float],
          benchmark: DecodeBenchmark, report: Path, elapsed: float) -> list[tuple[str, str]]:
    rows = []
    for role in ("target", "draft"):
        text, code = runs[role, "text"], runs[role, "code"]
        rows.append((f"{role}", f"{count(text.tokens)} tokens of books, {count(code.tokens)} of code, "
                                f"{count(code.tokens_per_second)} tokens/s"))
        for kind, name in (("code", "code"), ("text", "books")):
            before, after = scores[role, "text", kind], scores[role, "code", kind]
            rows.append((f"  bits per byte, held-out {name}", f"{before:.3f} before fine-tuning, {after:.3f} after"))
    draft = benchmark.draft
    rate = f"{100 * draft.acceptance_rate:.0f} %" if draft.acceptance_rate is not None else "none drafted"
    rows += [
        ("target alone", f"{benchmark.plain.tokens_per_second:.0f} tokens/s"),
        ("target with draft", f"{draft.tokens_per_second:.0f} tokens/s"),
        ("speed-up", f"{benchmark.speedup:.2f}x"),
        ("identical output", f"{benchmark.identical} of {len(benchmark.prompts)} prompts"),
        ("acceptance rate", f"{rate}, {draft.mean_accepted_length:.2f} tokens a pass"),
        ("report", str(report)), ("time", duration(elapsed)),
    ]
    return rows


def _next(out: Path) -> list[str]:
    target, draft = out / "target-code" / "model", out / "draft-code" / "model"
    return [
        f'outrider generate --target {target} --draft {draft} --colour "def main():"',
        f"outrider bench decode --target {target} --draft {draft} --prompts {out / 'prompts.txt'} --temperature 0.8",
        "outrider plan recipes/amd-135m.toml",
    ]
