"""The decoding benchmark: what it runs, what it says, and the prompt files it reads. No assertion on time."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from outrider.benchmarks.decode import DecodeBenchmark, PromptResult, benchmark_decode, read_prompts
from outrider.decoding import Decoder, Generation, Sampling, Statistics
from outrider.errors import SourceError
from tests.conftest import Cli

PROMPTS = ["def add_1(a, b):", "class Thing", "# a comment\n"]


class Recording:
    """A decoder that notes in which order it is asked."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.calls: list[tuple[str, bool]] = []
        self.target = decoder.target

    def generate(self, prompt: str, **options: Any) -> Generation:
        self.calls.append((prompt, options["speculate"]))
        return self.decoder.generate(prompt, **options)


@pytest.fixture(scope="module")
def decoder(model_folder: Path, draft_folder: Path) -> Decoder:
    return Decoder.load(model_folder, draft_folder, device="cpu")


@pytest.mark.parametrize(("sampling", "method"), [
    (Sampling(), "rejection"), (Sampling(1.0, seed=4), "coupled"), (Sampling(0.8, top_k=20), "coupled"),
])
@pytest.mark.parametrize("width", [3, "auto"])
def test_every_prompt_is_identical(decoder: Decoder, sampling: Sampling, method: Any, width: Any) -> None:
    benchmark = benchmark_decode(decoder, PROMPTS, max_new_tokens=12, sampling=sampling, method=method,
                                 width=width)
    assert benchmark.comparable
    assert benchmark.identical == len(PROMPTS)
    assert [result.prompt for result in benchmark.prompts] == PROMPTS
    seeded = dataclasses.replace(sampling, seed=sampling.seed or 0)
    for result in benchmark.prompts:
        assert result.identical
        assert result.draft_tokens == decoder.generate(
            result.prompt, max_new_tokens=12, sampling=seeded, method=method, speculate=False).ids
        assert len(result.draft_tokens) == len(result.drafted)
        assert len(result.plain_rates) == len(result.draft_rates) == 2


def test_rejection_sampling_is_not_compared_token_for_token(decoder: Decoder) -> None:
    benchmark = benchmark_decode(decoder, PROMPTS, max_new_tokens=8, sampling=Sampling(1.0), repeats=1)
    assert not benchmark.comparable
    assert benchmark.settings["seed"] == 0, "without a seed of its own a benchmark still repeats"


def test_with_and_without_alternate_and_each_goes_first_as_often(decoder: Decoder) -> None:
    recording = Recording(decoder)
    prompts = PROMPTS[:2]
    benchmark_decode(recording, prompts, max_new_tokens=4, repeats=2)  # type: ignore[arg-type]
    warm_up, timed = recording.calls[:2], recording.calls[2:]
    assert sorted(speculate for _, speculate in warm_up) == [False, True]
    pairs = list(zip(timed[::2], timed[1::2], strict=True))
    assert len(pairs) == 4
    for (prompt, first), (other, second) in pairs:
        assert prompt == other
        assert first != second
    for prompt in prompts:
        assert sorted(first for (asked, first), _ in pairs if asked == prompt) == [False, True]


def test_counts_cover_all_prompts_and_repeats(decoder: Decoder) -> None:
    benchmark = benchmark_decode(decoder, PROMPTS, max_new_tokens=6, repeats=3, width=2)
    for statistics in (benchmark.plain, benchmark.draft):
        assert statistics.generated == 3 * sum(len(result.draft_tokens) for result in benchmark.prompts)
    assert benchmark.plain.drafted == 0
    assert benchmark.draft.drafted > 0


def test_a_difference_in_any_repeat_counts(decoder: Decoder) -> None:
    class Fickle(Recording):
        """Says something else with the draft once: in the second of three repeats of the second prompt."""

        def generate(self, prompt: str, **options: Any) -> Generation:
            result = super().generate(prompt, **options)
            asked = sum(call == (PROMPTS[1], True) for call in self.calls)
            if (prompt, options["speculate"], asked) == (PROMPTS[1], True, 2):
                del result.tokens[-1]
            return result

    benchmark = benchmark_decode(Fickle(decoder), PROMPTS, max_new_tokens=4, repeats=3)  # type: ignore[arg-type]
    assert benchmark.identical == len(PROMPTS) - 1
    assert [result.identical for result in benchmark.prompts] == [True, False, True]
    assert [entry["identical"] for entry in benchmark.dump()["results"]] == [True, False, True]


def test_dump_has_the_documented_keys(decoder: Decoder) -> None:
    benchmark = benchmark_decode(decoder, PROMPTS, max_new_tokens=8, repeats=1, settings={"target": "here"})
    dumped = benchmark.dump()
    assert json.loads(json.dumps(dumped, allow_nan=False)) == dumped
    assert dumped["format"] == "outrider-decode-benchmark"
    assert dumped["version"] == 1
    assert set(dumped) == {
        "format", "version", "provenance", "settings", "prompts", "comparable", "identical", "speedup",
        "speedup_geometric_mean", "plain", "draft", "results"}
    assert set(dumped["provenance"]) >= {
        "command", "date", "outrider", "torch", "python", "device", "threads"}
    assert dumped["settings"] == {
        "target": "here", "max_new_tokens": 8, "width": "auto", "method": "rejection", "repeats": 1,
        "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": None}
    assert (dumped["prompts"], dumped["identical"], dumped["comparable"]) == (3, 3, True)
    assert dumped["draft"] == benchmark.draft.dump()
    for key in ("tokens_per_second", "acceptance_rate", "mean_accepted_length", "acceptance_per_position"):
        assert key in dumped["plain"]
        assert key in dumped["draft"]
    assert all(set(result) == {"prompt", "text", "identical", "speedup", "plain_tokens_per_second",
                               "draft_tokens_per_second"} for result in dumped["results"])


def test_speedups_are_ratios_of_rates() -> None:
    """Of totals over all, and the geometric mean of each prompt's medians; from made-up rates."""
    prompts = [PromptResult("a", [1], [1], [10.0, 20.0, 90.0], [40.0, 41.0, 1.0]),  # medians 20 and 40
               PromptResult("b", [1], [1], [8.0], [4.0])]
    plain, draft = Statistics(generated=100, total_seconds=10.0), Statistics(generated=100, total_seconds=4.0)
    benchmark = DecodeBenchmark(prompts, plain, draft, True, {}, {})
    assert [result.speedup for result in prompts] == [2.0, 0.5]
    assert benchmark.speedup == pytest.approx(2.5)
    assert benchmark.speedup_geometric_mean == pytest.approx(1.0)


# Prompt files


def write_lines(path: Path, rows: list[Any], pack: Callable[[bytes], bytes] = bytes) -> Path:
    path.write_bytes(pack("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


@pytest.mark.parametrize(("suffix", "pack"), [
    (".jsonl", bytes), (".jsonl.gz", gzip.compress), (".jsonl.zst", zstandard.compress),
])
def test_prompts_from_jsonl(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    prompts = ["def f():\n    ", "a\n---\nb", "\u00e9 \U0001f642", "  indented"]
    rows = [{"prompt": prompt, "text": "not this", "id": index} for index, prompt in enumerate(prompts)]
    path = write_lines(tmp_path / f"prompts{suffix}", rows, pack)
    assert read_prompts(path) == prompts, "taken as they are: no separator inside JSON"
    assert read_prompts(str(path), limit=2) == prompts[:2]


@pytest.mark.parametrize(("text", "prompts"), [
    ("def f():\n    return", ["def f():\n    return"]),
    ("one\n---\ntwo\n---\nthree\n", ["one", "two", "three"]),
    ("one\ntwo\n---\n    three\n", ["one\ntwo", "    three"]),     # indentation is part of a prompt
    ("one\n\n---\n\ntwo", ["one\n", "\ntwo"]),                     # and so are blank lines
    ("---\none\n---\n---\n  \n---\ntwo\n---\n", ["one", "two"]),   # empty prompts are none
    ("a --- b\n----\n--- c", ["a --- b\n----\n--- c"]),             # a separator has a line of its own
    ("one\r\n---\r\ntwo\r\n", ["one", "two"]),
    ("page\x0cbreak\n---\nline\u2028break", ["page\x0cbreak", "line\u2028break"]),  # not ends of lines
])
def test_prompts_from_text(tmp_path: Path, text: str, prompts: list[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(text.encode())
    assert read_prompts(path) == prompts
    assert read_prompts(path, limit=1) == prompts[:1]


def empty(path: Path) -> Path:
    path.write_text("")
    return path


@pytest.mark.parametrize(("make", "says"), [
    (lambda place: place / "missing.jsonl", "missing.jsonl"),
    (lambda place: empty(place / "empty.txt"), "empty.txt"),
    (lambda place: empty(place / "empty.jsonl"), "empty.jsonl"),
    (lambda place: write_lines(place / "other.jsonl", [{"text": "x"}]), "field 'prompt'"),
    (lambda place: write_lines(place / "list.jsonl", [["x"]]), "field 'prompt'"),
    (lambda place: write_lines(place / "cut.jsonl.gz", [{"prompt": "x" * 999}],
                               lambda data: gzip.compress(data)[:-12]), "cut.jsonl.gz"),
])
def test_files_without_prompts(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_prompts(make(tmp_path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_of_separators_holds_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("---\n  \n---\n")
    with pytest.raises(SourceError, match="no prompt"):
        read_prompts(path)


def test_from_the_command_line(cli: Cli, tmp_path: Path, model_folder: Path, draft_folder: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    result = cli("bench", "decode", "--target", model_folder, "--draft", draft_folder, "--prompts", prompts,
                 "--max-new-tokens", 8, "--json", tmp_path / "out.json")
    assert result.returncode == 0, result.stderr
    dumped = json.loads((tmp_path / "out.json").read_text())
    assert (dumped["format"], dumped["identical"]) == ("outrider-decode-benchmark", 3)
    assert "bench decode" in dumped["provenance"]["command"]
