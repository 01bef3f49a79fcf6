"""Small real things that many tests share: a tokenizer, a corpus, models, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from outrider.corpus import Tokenizer, prepare
from outrider.model import Llama, ModelConfig, save_model

#: Development assets beside the checkout; tests that use them skip where they are absent.
SHARED = Path(__file__).resolve().parents[2] / "shared"

TEXTS = [
    f"def add_{i}(a, b):\n    '''Add {i} to the sum.'''\n    return a + b + {i}\n\n\n"
    f"class Thing{i}:\n    value = {i * i}\n"
    for i in range(60)
]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # Tiny models gain nothing from more, and threads that wait for one another are slow on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe(TEXTS, 300)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for index, text in enumerate(TEXTS):
        (folder / f"{index:03d}.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, text_folder: Path, tokenizer: Tokenizer) -> Path:
    """A prepared corpus with both splits; do not change it."""
    folder = tmp_path_factory.mktemp("corpus") / "tiny"
    prepare([str(text_folder)], folder, tokenizer=tokenizer, validation=0.2)
    return folder


def tiny_config(vocab_size: int = 300, **changes: object) -> ModelConfig:
    """A shape small enough for anything."""
    fields: dict = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "max_position_embeddings": 128, **changes}
    return ModelConfig(**fields)


def tiny_model(seed: int = 0, **changes: object) -> Llama:
    """A model with random weights, wide enough apart that logits differ clearly."""
    model = Llama(tiny_config(**changes))  # type: ignore[arg-type]
    model.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A tiny target with tokenizer files; do not change it."""
    return save_model(tiny_model(1), tmp_path_factory.mktemp("models") / "target", tokenizer_from=corpus)


@pytest.fixture(scope="session")
def draft_folder(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A tiny draft with the same tokenizer; do not change it."""
    return save_model(tiny_model(2, num_hidden_layers=1), tmp_path_factory.mktemp("models") / "draft",
                      tokenizer_from=corpus)


@pytest.fixture
def recipe_file(tmp_path: Path, corpus: Path) -> Path:
    """A recipe that trains in a second or two, writing under tmp_path."""
    path = tmp_path / "recipe.toml"
    path.write_text(
        f"""
name = "tiny"
output = {json.dumps(str(tmp_path / "run"))}
[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 4
max_position_embeddings = 128
[data]
path = {json.dumps(str(corpus))}
[training]
tokens = 2560
batch_tokens = 256
context = 64
precision = "fp32"
[optimizer]
lr = 1e-3
[schedule]
warmup = 2
""",
        encoding="utf-8",
    )
    return path


Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Run the `outrider` command in tmp_path as a user would, in a process of its own."""

    def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "outrider", *map(str, arguments)], cwd=tmp_path, capture_output=True, text=True,
            input=stdin, env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "2"}, timeout=280, check=False)

    return run


def assert_one_line_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """The contract of every error a user can cause: exit code 2, one clear line, no traceback."""
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert "Traceback" not in result.stderr
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    for part in parts:
        assert part in errors[0], f"{part!r} not in {errors[0]!r}"
