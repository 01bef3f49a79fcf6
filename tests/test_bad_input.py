"""Every mistake in the input gives one clear line and exit code 2, and leaves earlier results as they were.

Most cases run the command in this process, which has torch loaded already; one of each family runs as a user would
run it. Variants of each kind of damage are in the tests of the part that reads the file.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from outrider.cli import main
from outrider.corpus import Tokenizer, prepare
from outrider.model import save_model
from outrider.recipe import Recipe
from outrider.training import train
from tests.conftest import TEXTS, Cli, assert_one_line_error, tiny_model

Run = Callable[..., subprocess.CompletedProcess[str]]
Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def outrider(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in this process, in tmp_path."""
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


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return everything under a folder: files with their bytes, folders as None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def refused(run: Run, folder: Path, *arguments: object, says: tuple[str, ...] = ()) -> None:
    """Run a command that must be refused in one line and change nothing under `folder`."""
    before = contents(folder)
    assert_one_line_error(run(*arguments), *says)
    after = contents(folder)
    assert sorted(after) == sorted(before)
    assert [name for name, raw in after.items() if raw != before[name]] == []


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *sections, last = key.split("__")
        table = values
        for section in sections:
            table = table[int(section) if section.isdigit() else section]
        table[last] = value
    path.write_text(json.dumps(values), encoding="utf-8")


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# Sources. Each case names a source; `outrider data prepare` is told to replace a corpus, which must stay.

LINES = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS)

SOURCES: dict[str, tuple[str, bytes | None, str]] = {
    "missing": ("nothing.txt", None, "no source 'nothing.txt'"),
    "missing, like a hub id": ("no/such", None, "hf:no/such"),
    "empty file": ("a.txt", b"", "holds no text"),
    "empty lines": ("a.jsonl", b"\n \n", "holds no text"),
    "empty folder": ("folder/", None, "folder"),
    "folder without text": ("folder/picture.png", b"\x89PNG\0", "holds no text"),
    "binary": ("a.txt", b"\x7fELF\0\0", "is not text"),
    "binary in a folder": ("folder/a.txt", b"\x7fELF\0\0", "is not text"),
    "not UTF-8": ("a.txt", b"caf\xe9", "is not UTF-8"),
    "line not UTF-8": ("a.jsonl", LINES + b'{"text": "caf\xe9"}', "a.jsonl:61 is not UTF-8"),
    "line not JSON": ("a.jsonl", LINES + b"text", "a.jsonl:61 is not JSON"),
    "line without the field": ("a.jsonl", LINES + b'{"body": "x"}', "a.jsonl:61 has no text in field 'text'"),
    "JSON without end": ("a.jsonl", b"[" * 100_000, "a.jsonl:1"),
    "gzip cut": ("a.jsonl.gz", gzip.compress(LINES)[:-9], "cut short"),
    "gzip that is none": ("a.jsonl.gz", LINES, "a.jsonl.gz"),
    "zstd cut": ("a.jsonl.zst", zstandard.ZstdCompressor(write_checksum=True).compress(LINES)[:-1], "cut short"),
    "zstd that is none": ("a.jsonl.zst", LINES, "a.jsonl.zst"),
    "parquet that is none": ("a.parquet", LINES, "not a readable parquet file"),
    "parquet empty": ("a.parquet", b"", "not a readable parquet file"),
}


def place(folder: Path, name: str, data: bytes | None) -> str:
    """Write a source; return how to name it on the command line."""
    path = folder / name
    if name.endswith("/"):
        path.mkdir()
    elif data is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return name.split("/")[0] if name.startswith("folder") else name


@pytest.mark.parametrize("case", SOURCES)
def test_a_bad_source(outrider: Run, tmp_path: Path, corpus: Path, case: str) -> None:
    name, data, says = SOURCES[case]
    source = place(tmp_path, name, data)
    shutil.copytree(corpus, tmp_path / "kept")
    refused(outrider, tmp_path, "data", "prepare", source, "--out", "kept", "--force", "--tokenizer", corpus,
            says=(says,))


def test_a_bad_source_after_a_good_one(cli: Cli, tmp_path: Path, text_folder: Path, corpus: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    shutil.copytree(corpus, tmp_path / "kept")
    refused(cli, tmp_path, "data", "prepare", text_folder, "bad.txt", "--out", "kept", "--force",
            says=("bad.txt is not UTF-8", "--bad-text"))


@pytest.mark.parametrize(("options", "says"), [
    (("--tokenizer", "nothing.json"), "nothing.json"), (("--tokenizer", "bad.json"), "bad.json"),
    (("--tokenizer", "bad.model"), "bad.model"), (("--tokenizer", "bpe:10"), "257"),
    (("--tokenizer", "bpe:big"), "bpe:SIZE"), (("--validation", "1"), "validation"),
    (("--validation", "-0.5"), "validation"), (("--validation", "nan"), "validation"),
    (("--validation", "0.999999999"), "--validation 0"), (("--text-field", "body"), "body")], ids=str)
def test_a_bad_option_of_prepare(
        outrider: Run, tmp_path: Path, corpus: Path, options: tuple[str, str], says: str) -> None:
    for name in ("bad.json", "bad.model"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    shutil.copytree(corpus, tmp_path / "kept")
    refused(outrider, tmp_path, "data", "prepare", "a.jsonl", "--out", "kept", "--force", *options, says=(says,))


@pytest.mark.parametrize("out", ["kept", "file.txt", "file.txt/deeper", "x" * 300])
def test_an_output_that_cannot_be(outrider: Run, tmp_path: Path, text_folder: Path, corpus: Path, out: str) -> None:
    shutil.copytree(corpus, tmp_path / "kept")
    (tmp_path / "file.txt").write_text("keep me")
    refused(outrider, tmp_path, "data", "prepare", text_folder, "--tokenizer", corpus, "--out", out, says=(out,))


# Prepared corpora.


def cut_shard(corpus: Path) -> None:
    cut(corpus / "train-00000.bin", 100)


def replace_tokenizer(corpus: Path) -> None:
    Tokenizer.train_bpe(["something else " * 9], 280).save(corpus)


CORPORA: dict[str, tuple[Change, str]] = {
    "no manifest": (lambda corpus: (corpus / "manifest.json").unlink(), "has no manifest.json"),
    "manifest not JSON": (lambda corpus: cut(corpus / "manifest.json", 50), "not valid JSON"),
    "manifest not UTF-8": (lambda corpus: (corpus / "manifest.json").write_bytes(b"\xff"), "not valid JSON"),
    "manifest of another kind": (lambda corpus: edit_json(corpus / "manifest.json", format="x"), "format"),
    "manifest of a later version": (lambda corpus: edit_json(corpus / "manifest.json", version=2), "version"),
    "tokenizer replaced": (replace_tokenizer, "not the tokenizer"),
    "tokenizer missing": (lambda corpus: (corpus / "tokenizer.json").unlink(), "lacks its tokenizer"),
    "hash of the tokenizer": (
        lambda corpus: edit_json(corpus / "manifest.json", tokenizer__sha256="0" * 64), "not the tokenizer"),
    "hash of a shard": (lambda corpus: edit_json(corpus / "manifest.json", shards__0__sha256="0" * 64), "SHA-256"),
    "shard altered": (
        lambda corpus: (corpus / "train-00000.bin").write_bytes(
            bytes((corpus / "train-00000.bin").stat().st_size)), "SHA-256"),
    "shard cut": (cut_shard, "cut short"),
    "shard missing": (lambda corpus: (corpus / "train-00000.bin").unlink(), "lacks the shard"),
}


@pytest.fixture
def bad_corpus(request: pytest.FixtureRequest, tmp_path: Path, corpus: Path) -> tuple[Path, str]:
    change, says = CORPORA[request.param]
    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    change(folder)
    return folder, says


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run that went well: snapshots, metrics, model. Do not change it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(Recipe.build(recipe_values(corpus, folder)), warn=lambda _: None)
    return folder


def recipe_values(corpus: Path, output: Path) -> dict[str, Any]:
    return {
        "name": "tiny", "output": str(output), "data": {"path": str(corpus)},
        "model": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "max_position_embeddings": 128},
        "training": {"tokens": 512, "batch_tokens": 128, "context": 64, "precision": "fp32", "device": "cpu"}}


@pytest.fixture
def earlier(tmp_path: Path, finished_run: Path, recipe_file: Path) -> Path:
    """Where the recipe of `recipe_file` writes, with results of an earlier run in it."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.mark.parametrize("bad_corpus", CORPORA, indirect=True)
def test_training_on_a_bad_corpus(
        outrider: Run, tmp_path: Path, recipe_file: Path, earlier: Path, bad_corpus: tuple[Path, str]) -> None:
    folder, says = bad_corpus
    refused(outrider, tmp_path, "train", recipe_file, "--force", "--set", f"data.path={folder}", says=(says,))


@pytest.mark.parametrize("bad_corpus", CORPORA, indirect=True)
def test_verifying_a_bad_corpus(outrider: Run, tmp_path: Path, bad_corpus: tuple[Path, str]) -> None:
    refused(outrider, tmp_path, "data", "verify", bad_corpus[0], says=(bad_corpus[1],))


@pytest.mark.parametrize("bad_corpus", ["no manifest", "tokenizer replaced", "shard cut"], indirect=True)
def test_scoring_and_planning_on_a_bad_corpus(
        outrider: Run, tmp_path: Path, model_folder: Path, recipe_file: Path, bad_corpus: tuple[Path, str]) -> None:
    folder, says = bad_corpus
    refused(outrider, tmp_path, "eval", model_folder, "--data", folder, "--split", "train", says=(says,))
    refused(outrider, tmp_path, "plan", recipe_file, "--set", f"data.path={folder}", says=(says,))


@pytest.mark.parametrize("bad_corpus", ["shard cut"], indirect=True)
def test_a_bad_corpus_as_a_user_meets_it(
        cli: Cli, tmp_path: Path, recipe_file: Path, earlier: Path, bad_corpus: tuple[Path, str]) -> None:
    folder, says = bad_corpus
    refused(cli, tmp_path, "train", recipe_file, "--force", "--set", f"data.path={folder}", says=(says,))


def test_a_corpus_of_another_tokenizer_than_the_models(
        outrider: Run, tmp_path: Path, model_folder: Path, text_folder: Path, recipe_file: Path, earlier: Path) -> None:
    other = tmp_path / "other"
    prepare([str(text_folder)], other, tokenizer=Tokenizer.train_bpe(["quite other text " * 20], 290), validation=0.2)
    says = ("another tokenizer", str(model_folder))
    refused(outrider, tmp_path, "eval", model_folder, "--data", other, says=says)
    recipe_file.write_text("\n".join(line for line in recipe_file.read_text().splitlines() if not line.startswith(
        ("hidden_size", "intermediate_size", "num_", "max_position"))))
    refused(outrider, tmp_path, "train", recipe_file, "--force", "--set", f"model.start_from={model_folder}",
            "--set", f"data.path={other}", says=says)


def test_a_corpus_without_a_validation_split(
        outrider: Run, tmp_path: Path, model_folder: Path, text_folder: Path, tokenizer: Tokenizer) -> None:
    prepare([str(text_folder)], tmp_path / "all", tokenizer=tokenizer, validation=0)
    refused(outrider, tmp_path, "eval", model_folder, "--data", "all", says=("--validation",))


# Recipes.

OVERRIDES = {
    "training.tokns=5": "did you mean 'tokens'", "trainig.tokens=5": "did you mean 'training'",
    "model.hiden_size=5": "hiden_size", "model.num_attention_heads=5": "num_attention_heads 5",
    "model.num_key_value_heads=3": "num_key_value_heads 3", "model.head_dim=7": "head_dim 7",
    "model.max_position_embeddings=32": "max_position_embeddings 32", "model.vocab_size=10": "10 tokens",
    "training.context=256": "context 256", "training.batch_tokens=100": "multiple",
    "training.tokens=0": "tokens", "training.tokens=lots": "tokens", "training.precision=fp8": "precision",
    "training.device=abacus": "abacus", "optimizer.lr=-1": "lr", "optimizer.lr=nan": "lr", "optimizer.kind=sgd": "kind",
    "schedule.final=2": "final", "snapshots.keep=0": "keep", "data.path=nowhere": "nowhere", "training": "key=value",
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_bad_recipe(outrider: Run, tmp_path: Path, recipe_file: Path, earlier: Path, override: str) -> None:
    refused(outrider, tmp_path, "train", recipe_file, "--force", "--set", override, says=(OVERRIDES[override],))


@pytest.mark.parametrize("override", ["training.tokns=5", "model.num_attention_heads=5", "training.context=256"])
def test_a_bad_recipe_is_not_planned_either(outrider: Run, tmp_path: Path, recipe_file: Path, override: str) -> None:
    refused(outrider, tmp_path, "plan", recipe_file, "--set", override, says=(OVERRIDES[override],))


@pytest.mark.parametrize("data", [None, b"name = ", b"\xff\xfe", b"[model]\n"])
def test_a_file_that_is_no_recipe(
        outrider: Run, tmp_path: Path, recipe_file: Path, earlier: Path, data: bytes | None) -> None:
    path = tmp_path / "bad.toml"
    if data is not None:
        path.write_bytes(data)
    refused(outrider, tmp_path, "train", path, "--force", says=("bad.toml",))


def test_a_bad_recipe_as_a_user_meets_it(cli: Cli, tmp_path: Path, recipe_file: Path, earlier: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("num_attention_heads = 4", "num_attention_heads = 5"))
    refused(cli, tmp_path, "train", recipe_file, "--force", says=("hidden_size 32", "num_attention_heads 5"))


def test_a_run_that_is_there_already(outrider: Run, tmp_path: Path, recipe_file: Path, earlier: Path) -> None:
    refused(outrider, tmp_path, "train", recipe_file, says=("--resume", "--force"))


# Model folders.


def edit_config(**changes: Any) -> Change:
    return lambda folder: edit_json(folder / "config.json", **changes)


def damage_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:12] = b"@@@@"
    path.write_bytes(raw)


MODELS: dict[str, tuple[Change, str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "header damaged": (damage_header, "damaged"),
    "header of no end": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 8 + bytes(99)), "damaged"),
    "weights empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged"),
    "weights cut": (lambda folder: cut(folder / "model.safetensors", 20_000), "damaged"),
    "weights are a pickle": (lambda folder: torch.save({}, folder / "model.safetensors"), "damaged"),
    "config not JSON": (lambda folder: cut(folder / "config.json", 50), "not valid JSON"),
    "config not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "not valid JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
    "another family": (edit_config(model_type="gpt2"), "gpt2"),
    "biases": (edit_config(attention_bias=True), "attention_bias"),
    "unknown rope scaling": (edit_config(rope_scaling={"rope_type": "yarn", "factor": 2}), "yarn"),
    "rope scaling a number": (edit_config(rope_scaling=5), "rope_scaling"),
    "rope parameters a text": (edit_config(rope_parameters="none"), "rope_parameters"),
    "heads": (edit_config(num_attention_heads=5, head_dim=None), "num_attention_heads 5"),
    "key missing": (edit_config(hidden_size=None), "hidden_size"),
    "another width": (edit_config(hidden_size=64, head_dim=None), "shape"),
    "more layers": (edit_config(num_hidden_layers=3), "lacks the tensor"),
    "fewer layers": (edit_config(num_hidden_layers=1), "does not call for"),
    "tokenizer damaged": (lambda folder: cut(folder / "tokenizer.json", 99), "tokenizer.json"),
    "tokenizer config damaged": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "tokenizer_config.json"),
    "index damaged": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "model.safetensors.index.json"),
    "index names nothing": (lambda folder: (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": null}}'), "model.safetensors.index.json"),
}


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("case", MODELS)
def test_generating_with_a_bad_model(
        outrider: Run, tmp_path: Path, model_folder: Path, case: str, role: str) -> None:
    change, says = MODELS[case]
    bad = Path(shutil.copytree(model_folder, tmp_path / "bad"))
    change(bad)
    models = ("--target", bad) if role == "target" else ("--target", model_folder, "--draft", bad)
    refused(outrider, tmp_path, "generate", *models, "-n", 2, "def", says=(says,))


@pytest.mark.parametrize("case", ["no config", "no weights", "header damaged", "another family"])
def test_training_from_a_bad_model(outrider: Run, tmp_path: Path, corpus: Path, finished_run: Path,
                                   model_folder: Path, case: str) -> None:
    change, says = MODELS[case]
    bad = Path(shutil.copytree(model_folder, tmp_path / "bad"))
    change(bad)
    shutil.copytree(finished_run, tmp_path / "run")
    (tmp_path / "r.toml").write_text(
        f'name = "run"\noutput = "run"\n[model]\nstart_from = "bad"\n[data]\npath = {json.dumps(str(corpus))}\n'
        "[training]\ntokens = 256\nbatch_tokens = 128\ncontext = 64\n")
    refused(outrider, tmp_path, "train", "r.toml", "--force", says=(says,))


def test_a_bad_model_as_a_user_meets_it(cli: Cli, tmp_path: Path, model_folder: Path) -> None:
    bad = Path(shutil.copytree(model_folder, tmp_path / "bad"))
    damage_header(bad)
    refused(cli, tmp_path, "generate", "--target", bad, "def", says=("damaged", "model.safetensors"))


def test_a_model_that_is_no_folder(outrider: Run, tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path / "file", ""):
        refused(outrider, tmp_path, "generate", "--target", path, "x")
        refused(outrider, tmp_path, "generate", "--target", model_folder, "--draft", path, "x")


# Draft and target.


@pytest.fixture
def other_draft(tmp_path: Path) -> Path:
    """A draft whose ids mean other things."""
    folder = tmp_path / "other"
    folder.mkdir()
    Tokenizer.train_bpe(["quite another text, of other words " * 20], 300).save(folder)
    return save_model(tiny_model(3, num_hidden_layers=1), folder / "draft", tokenizer_from=folder)


def test_a_draft_of_another_tokenizer(cli: Cli, tmp_path: Path, model_folder: Path, other_draft: Path) -> None:
    refused(cli, tmp_path, "generate", "--target", model_folder, "--draft", other_draft, "def", says=("tokenizer",))


def test_a_benchmark_keeps_its_earlier_result(
        outrider: Run, tmp_path: Path, model_folder: Path, draft_folder: Path, other_draft: Path) -> None:
    (tmp_path / "result.json").write_text('{"from": "last week"}')
    (tmp_path / "prompts.txt").write_text("def add")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("---\n---\n")
    (tmp_path / "lines.jsonl").write_text('{"text": "no prompt"}\n')
    for draft, prompts, options, says in [
        (other_draft, "prompts.txt", (), "tokenizer"), (draft_folder, "nothing.txt", (), "nothing.txt"),
        (draft_folder, "latin.txt", (), "not UTF-8"), (draft_folder, "empty.txt", (), "no prompt"),
        (draft_folder, "lines.jsonl", (), "prompt"), (draft_folder, "prompts.txt", ("--width", 99), "width"),
        (draft_folder, "prompts.txt", ("--temperature", -1), "temperature"),
        (draft_folder, "prompts.txt", ("-n", 1000), "positions"),
    ]:
        refused(outrider, tmp_path, "bench", "decode", "--target", model_folder, "--draft", draft, "--prompts", prompts,
                "--json", "result.json", *options, says=(says,))


# Decoding parameters.

PARAMETERS: dict[str, tuple[tuple[object, ...], str]] = {
    "width": (("--width", 99), "width"), "width below 0": (("--width", -1), "width"),
    "width no number": (("--width", "wide"), "width"), "width no digit": (("--width", "²"), "width"),
    "temperature": (("--temperature", -0.5), "temperature"),
    "temperature nan": (("--temperature", "nan"), "temperature"),
    "temperature inf": (("--temperature", "inf"), "temperature"),
    "top-k": (("--temperature", 1, "--top-k", -1), "top-k"),
    "top-p 0": (("--temperature", 1, "--top-p", 0), "top-p"), "top-p 2": (("--temperature", 1, "--top-p", 2), "top-p"),
    "top-p nan": (("--temperature", 1, "--top-p", "nan"), "top-p"),
    "no tokens": (("-n", 0), "max_new_tokens"), "fewer than none": (("-n", -5), "max_new_tokens"),
    "too many": (("-n", 128), "128 positions"), "far too many": (("-n", 10**12), "128 positions"),
    "method": (("--temperature", 1, "--method", "guess"), "guess"),
    "stop": (("--stop", ""), "stop string"),
    "seed": (("--temperature", 1, "--seed", 10**30), "seed"),
    "seed, coupled": (("--temperature", 1, "--seed", 10**30, "--method", "coupled"), "seed"),
    "device": (("--device", "abacus"), "abacus"),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_an_absurd_parameter(
        outrider: Run, tmp_path: Path, model_folder: Path, draft_folder: Path, case: str) -> None:
    options, says = PARAMETERS[case]
    refused(outrider, tmp_path, "generate", "--target", model_folder, "--draft", draft_folder, "-n", 8, *options, "def",
            says=(says,))


def test_a_prompt_that_is_too_long(outrider: Run, tmp_path: Path, model_folder: Path) -> None:
    refused(outrider, tmp_path, "generate", "--target", model_folder, "-n", 1, "x " * 200, says=("128 positions",))


def test_absurd_parameters_as_a_user_meets_them(
        cli: Cli, tmp_path: Path, model_folder: Path, draft_folder: Path) -> None:
    refused(cli, tmp_path, "generate", "--target", model_folder, "--draft", draft_folder, "-n", 8, "--width", 99, "def",
            says=("width", "99"))


@pytest.mark.parametrize("how", ["argument", "standard input"])
def test_a_prompt_that_is_not_utf8(tmp_path: Path, model_folder: Path, how: str) -> None:
    command = [sys.executable, "-m", "outrider", "generate", "--target", str(model_folder), "-n", "2"]
    arguments = [*map(os.fsencode, command), *([b"caf\xe9"] if how == "argument" else [])]
    done = subprocess.run(arguments, input=b"caf\xe9", capture_output=True, cwd=tmp_path, check=False,
                          env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"})
    assert_one_line_error(subprocess.CompletedProcess(
        arguments, done.returncode, done.stdout.decode(), done.stderr.decode()), "UTF-8")


# A full disk, with a real file system of a few hundred KiB.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount, or enlarge, a file system of so many KiB; needs the right to mount."""
    folder = tmp_path / "disk"

    def mount(kib: int) -> Path:
        if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
            pytest.skip("mounting a small file system needs root")
        folder.mkdir(exist_ok=True)
        options = f"size={kib}k" + (",remount" if folder.is_mount() else "")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
                          capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system is not permitted here")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_preparing_on_a_full_disk(
        cli: Cli, tmp_path: Path, text_folder: Path, corpus: Path, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64)
    shutil.copytree(corpus, disk / "kept")
    (disk / "ballast").write_bytes(bytes(disk_space(disk) - 12_000))
    refused(cli, disk, "data", "prepare", text_folder, "--out", disk / "kept", "--force", says=("disk is full",))


def disk_space(folder: Path) -> int:
    return shutil.disk_usage(folder).free


# A snapshot of this model takes about 470 KB: too little for the metrics; for a snapshot; for a second one; for a
# third one beside the two that are kept.
@pytest.mark.parametrize("kib", [4, 300, 700, 1200])
def test_training_on_a_full_disk(outrider: Run, corpus: Path, tmp_path: Path, finished_run: Path,
                                 small_disk: Callable[[int], Path], kib: int) -> None:
    disk = small_disk(kib)
    recipe = tmp_path / "r.toml"
    values = recipe_values(corpus, disk / "run")
    recipe.write_text("\n".join(
        [f"name = {json.dumps(values['name'])}", f"output = {json.dumps(values['output'])}"]
        + [f"[{section}]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in values[section].items())
           for section in ("data", "model", "training")] + ["[snapshots]\nevery = 1\nkeep = 2\n"]))
    assert_one_line_error(outrider("train", recipe), "disk is full")
    assert [name for name in contents(disk) if ".partial" in name or ".old" in name] == []
    # What had been saved is whole: with room, the run ends as if nothing had happened.
    small_disk(20_000)
    done = outrider("train", recipe, "--resume")
    assert done.returncode == 0, done.stderr
    name = "model/model.safetensors"
    assert (disk / "run" / name).read_bytes() == (finished_run / name).read_bytes()


def test_a_report_without_anything_to_report(outrider: Run, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("last week's")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "text.json").write_text("text")
    for arguments in ((), ("nothing",), ("empty",), ("--bench", "nothing.json"), ("--bench", "other.json"),
                      ("--bench", "text.json")):
        refused(outrider, tmp_path, "report", *arguments)
