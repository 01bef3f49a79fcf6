"""The command line: help without torch, usage errors, one-line errors, and a happy path of each verb."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from outrider import __version__
from outrider.cli import app, main
from outrider.corpus import Tokenizer
from outrider.training.telemetry import read_metrics
from tests.conftest import Cli, assert_one_line_error

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def verbs(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command and group, by its words."""
    command = command or typer.main.get_command(app)
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from verbs(inner, (*path, name))


VERBS = list(verbs())


@pytest.fixture
def outrider(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process, which has torch loaded already, as `cli` runs it in another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["outrider", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), out, err)

    return run


def test_no_verb_was_lost() -> None:
    assert {" ".join(path) for path in VERBS} >= {
        "data prepare", "data verify", "train", "plan", "eval", "generate", "convert", "bench decode",
        "bench data", "bench gpu", "report", "quickstart", "doctor"}


@pytest.mark.parametrize("path", VERBS, ids=lambda path: " ".join(path) or "outrider")
def test_every_verb_explains_itself(outrider: Run, path: tuple[str, ...]) -> None:
    result = outrider(*path, "--help")
    assert result.returncode == 0
    assert "Usage: " in result.stdout
    assert " ".join(path) in result.stdout
    assert result.stderr == ""
    for parameter in command_of(path).params:
        assert parameter.opts[0].lower() in result.stdout.lower(), f"{parameter.opts[0]} is not explained"


def command_of(path: tuple[str, ...]) -> Any:
    command: Any = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return command


def test_help_needs_no_torch() -> None:
    """Importing torch takes seconds; a person who asks for help should not wait for it."""
    script = f"""
import sys
from outrider.cli import main
for path in {[list(path) for path in VERBS]!r}:
    sys.argv = ["outrider", *path, "--help"]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, path
    heavy = {{"torch", "transformers", "tokenizers", "numpy", "matplotlib"}} & sys.modules.keys()
    assert not heavy, (path, heavy)
print("all", file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "all\n"


def test_the_version(cli: Cli) -> None:
    result = cli("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"outrider {__version__}\n", "")


@pytest.mark.parametrize("arguments", [
    "nonsense", "train", "train a b", "train x --nonsense", "plan", "eval", "eval x", "generate",
    "generate x",
    "generate --target x -n many", "generate --target x --temperature hot",
    "data prepare", "data prepare x", "data nonsense", "data verify", "bench decode --target x",
    "bench data x", "bench nonsense", "quickstart --minutes 0", "quickstart --minutes soon",
    "doctor --slow", "--nonsense", "data prepare x --out y --bad-text maybe", "eval x --data y --split test",
    "bench decode --target x --draft y --prompts z --repeats 0",
])
def test_a_usage_error_exits_with_2(outrider: Run, arguments: str) -> None:
    result = outrider(*arguments.split())
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert "Error" in result.stderr


@pytest.mark.parametrize("arguments", [
    "train nowhere.toml", "plan nowhere.toml", "eval nowhere --data nowhere", "data verify nowhere",
    "data prepare nowhere --out out", "convert nowhere.gguf --out out", "generate hello --target nowhere",
    "bench data nowhere --tokenizer nowhere", "report nowhere",
    "bench decode --target nowhere --draft nowhere --prompts nowhere", "bench gpu --device cuda:99",
])
def test_a_missing_input_is_one_line(outrider: Run, tmp_path: Path, arguments: str) -> None:
    result = outrider(*arguments.split())
    assert_one_line_error(result, "nowhere" if "nowhere" in arguments else "cuda:99")
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_error_is_printed_as_it_is(outrider: Run) -> None:
    """What looks like markup in a name is part of the name, and a line break in it breaks no line."""
    assert_one_line_error(outrider("plan", "[bold]odd[/bold].toml"), "[bold]odd[/bold].toml")
    assert_one_line_error(outrider("plan", "two\nlines.toml"), "two lines.toml")


def test_debug_shows_the_traceback(cli: Cli) -> None:
    result = cli("--debug", "plan", "nowhere.toml")
    assert result.returncode not in (0, 2)
    assert "Traceback" in result.stderr
    assert "outrider.errors.ConfigError: no recipe nowhere.toml" in result.stderr


def test_train_plan_eval_and_generate(outrider: Run, recipe_file: Path, corpus: Path, tokenizer: Tokenizer,
                                      tmp_path: Path) -> None:
    """The happy path, each verb on what the one before it made."""
    planned = json.loads(outrider("plan", recipe_file, "--json").stdout)
    assert planned["steps"] == 10
    table = outrider("plan", recipe_file)
    assert table.returncode == 0
    assert "10 steps" in table.stderr

    trained = outrider("train", recipe_file, "--json", "--set", "training.seed=4")
    assert trained.returncode == 0, trained.stderr
    made = json.loads(trained.stdout)
    assert made["steps"] == planned["steps"]
    assert Path(made["model"]) == tmp_path / "run" / "model"
    assert [r["loss"] for r in read_metrics(Path(made["metrics"])) if "loss" in r][-1] == made["loss"]
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["training"]["seed"] == 4

    scored = outrider("eval", made["model"], "--data", corpus, "--context", "64", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["bits_per_byte"] == pytest.approx(made["bits_per_byte"], rel=1e-6)
    assert "bits per byte" in outrider("eval", made["model"], "--data", corpus).stdout

    prompt = "def add_7(a, b):"
    written = outrider("generate", prompt, "--target", made["model"], "-n", "8", "--json")
    assert written.returncode == 0, written.stderr
    result = json.loads(written.stdout)
    assert result["prompt"] == prompt
    assert 1 <= len(result["tokens"]) <= 8
    assert result["text"] == tokenizer.decode(result["tokens"])
    assert result["drafted"] == [False] * len(result["tokens"])
    shown = outrider("generate", prompt, "--target", made["model"], "-n", "8")
    assert shown.stdout == f"{prompt}{result['text']}\n"
    assert "tokens/s" in shown.stderr


def test_train_says_where_the_model_is_on_one_line(outrider: Run, recipe_file: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a terminal rich takes 80 columns; a path cut in two cannot be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / ("long-" * 16)
    result = outrider("train", recipe_file, "--set", f"output='{folder}'")
    assert result.returncode == 0, result.stderr
    assert str(folder / "model") in result.stderr


def test_generate_reads_the_prompt_from_standard_input(cli: Cli, model_folder: Path) -> None:
    result = cli("generate", "--target", model_folder, "-n", "4", stdin="class Thing3:")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("class Thing3:")


def test_generate_colours_what_the_draft_guessed(outrider: Run, model_folder: Path) -> None:
    """A model drafting for itself is always right: all but each round's own token is green."""
    prompt = "def add_3(a, b):"
    plain = outrider("generate", prompt, "--target", model_folder, "-n", "12").stdout
    coloured = outrider("generate", prompt, "--target", model_folder, "--draft", model_folder, "-n", "12",
                        "--width", "3", "--colour")
    assert coloured.returncode == 0, coloured.stderr
    assert "\x1b[32m" in coloured.stdout
    assert coloured.stdout.replace("\x1b[32m", "").replace("\x1b[0m", "") == plain
    assert "accepted" in coloured.stderr


def test_doctor_shows_a_table(outrider: Run) -> None:
    result = outrider("doctor", "--fast")
    assert result.returncode == 0
    for part in ("torch", "device", "free disk", "extra [eval]"):
        assert part in result.stderr
    assert "->" in result.stderr


def test_data_prepare_and_verify(outrider: Run, text_folder: Path, tmp_path: Path) -> None:
    made = outrider("data", "prepare", text_folder, "--out", "corpus", "--tokenizer", "bpe:300", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == json.loads((tmp_path / "corpus" / "manifest.json").read_text())
    assert outrider("data", "verify", "corpus").returncode == 0
    again = outrider("data", "prepare", text_folder, "--out", "corpus", "--tokenizer", "bpe:300")
    assert_one_line_error(again, "corpus", "--force")
    assert outrider("data", "prepare", text_folder, "--out", "corpus", "--tokenizer", "bpe:300",
                    "--force").returncode == 0


def test_bench_gpu_without_one_says_so_and_succeeds(outrider: Run, tmp_path: Path) -> None:
    result = outrider("bench", "gpu", "--device", "cpu")
    assert result.returncode == 0
    assert "no accelerator" in result.stderr
    assert list(tmp_path.iterdir()) == []
