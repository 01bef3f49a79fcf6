"""Reading a prepared corpus: any stretch of tokens, and no damage unseen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outrider.corpus import Manifest, TokenCorpus, Tokenizer, Windows, prepare, verify_corpus
from outrider.errors import CorpusError
from tests.conftest import TEXTS


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    """A corpus that a test may damage."""
    return Path(shutil.copytree(corpus, tmp_path / "copy"))


@pytest.fixture(scope="module")
def cut_small(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A corpus of one short text in shards of five tokens."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "a.txt").write_text(TEXTS[0])
    prepare([str(folder / "a.txt")], folder / "out", tokenizer=tokenizer, validation=0, shard_tokens=5)
    return folder / "out"


# Reading.


def test_every_stretch_reads_right(cut_small: Path, tokenizer: Tokenizer) -> None:
    corpus = TokenCorpus(cut_small)
    expected = tokenizer.encode(TEXTS[0])
    assert len(corpus) == len(expected) > 20
    assert len(corpus.manifest.shards) == -(-len(expected) // 5)
    for start in range(len(expected) + 1):
        for count in range(len(expected) + 3):
            got = corpus.read(start, count)
            assert got.dtype == np.int64
            assert got.tolist() == expected[start:start + count]  # fewer at the end, none beyond it


@pytest.mark.parametrize("start", [-1, -5])
def test_reading_before_the_start(cut_small: Path, start: int) -> None:
    with pytest.raises(IndexError):
        TokenCorpus(cut_small).read(start, 3)


def test_reading_past_the_end(cut_small: Path) -> None:
    corpus = TokenCorpus(cut_small)
    with pytest.raises(IndexError):
        corpus.read(len(corpus) + 1, 1)


def test_splits_are_apart(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    for split in ("train", "validation"):
        opened = TokenCorpus(corpus, split)
        assert opened.totals == manifest.splits[split]
        assert len(opened) == manifest.splits[split].tokens > 0
        assert opened.bytes_per_token == opened.totals.bytes / (len(opened) - 1)
        shards = [shard.file for shard in manifest.shards if shard.split == split]
        raw = b"".join((corpus / shard).read_bytes() for shard in shards)
        assert opened.read(0, len(opened)).tolist() == np.frombuffer(raw, "<u2").tolist()


def test_an_empty_split_has_no_tokens(cut_small: Path) -> None:
    empty = TokenCorpus(cut_small, "validation")
    assert len(empty) == 0
    assert empty.read(0, 5).tolist() == []
    with pytest.raises(CorpusError, match="validation split"):
        Windows(empty, 4)


def test_a_large_corpus_is_mapped_not_read(cut_small: Path, tmp_path: Path) -> None:
    # Three GiB of zeros in a sparse file: opening must neither read nor hash them.
    folder = Path(shutil.copytree(cut_small, tmp_path / "large"))
    tokens = 3 << 29
    for path in folder.glob("*.bin"):
        path.unlink()
    with (folder / "train-00000.bin").open("wb") as file:
        file.truncate(2 * tokens - 2)
        file.seek(0, os.SEEK_END)
        file.write(b"\x07\x01")
    edit(folder, lambda values: values.update(
        shards=[{"file": "train-00000.bin", "split": "train", "tokens": tokens, "sha256": "0" * 64}],
        splits={"train": {"documents": 1, "bytes": tokens, "tokens": tokens}}))
    script = textwrap.dedent("""
        import resource, sys
        from outrider.corpus import TokenCorpus
        corpus = TokenCorpus(sys.argv[1])
        print(len(corpus), corpus.read(len(corpus) - 2, 9).tolist())
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 20)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{tokens} [0, 263]", "True"]


# Damage.


def test_a_good_corpus_passes(copy: Path) -> None:
    assert verify_corpus(copy) == Manifest.load(copy)


def test_any_changed_byte_of_a_shard_is_seen(cut_small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cut_small, tmp_path / "copy"))
    for path in sorted(folder.glob("*.bin")):
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1:])
            with pytest.raises(CorpusError, match=path.name):
                TokenCorpus(folder)  # small enough to be hashed when opened
            with pytest.raises(CorpusError, match=path.name):
                verify_corpus(folder)
        path.write_bytes(whole)


@pytest.mark.parametrize("verify", [None, False, True])
def test_a_shard_cut_or_grown_is_seen_even_unhashed(cut_small: Path, tmp_path: Path, verify: bool | None) -> None:
    folder = Path(shutil.copytree(cut_small, tmp_path / "copy"))
    path = folder / "train-00001.bin"
    whole = path.read_bytes()
    for raw in [*(whole[:size] for size in range(len(whole))), whole + b"\0", whole + b"\0\0"]:
        path.write_bytes(raw)
        with pytest.raises(CorpusError, match=r"train-00001\.bin"):
            TokenCorpus(folder, verify=verify)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_verify_looks_at_every_split(copy: Path, split: str) -> None:
    path = copy / f"{split}-00000.bin"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CorpusError, match="SHA-256"):
        verify_corpus(copy)


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "train-00000.bin"])
def test_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CorpusError, match=name):
        TokenCorpus(copy)


def test_another_tokenizer(copy: Path) -> None:
    Tokenizer.train_bpe(["quite another text " * 9], 270).save(copy)
    with pytest.raises(CorpusError, match="not the tokenizer"):
        TokenCorpus(copy)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"3", b'"x"', b"{}", b"\xff\xfe", b"\0\0"])
def test_a_manifest_that_is_none(copy: Path, data: bytes) -> None:
    (copy / "manifest.json").write_bytes(data)
    with pytest.raises(CorpusError, match=r"manifest\.json") as caught:
        TokenCorpus(copy)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_another_kind_or_version(copy: Path) -> None:
    for key, value in (("format", "other"), ("version", 2), ("dtype", "int8"), ("surprise", 1)):
        damaged = Path(shutil.copytree(copy, copy.with_name(f"with-{key}")))
        edit(damaged, lambda values, key=key, value=value: values.update({key: value}))
        with pytest.raises(CorpusError, match=key):
            TokenCorpus(damaged)


def remove_key(values: dict[str, Any], path: tuple) -> None:
    for part in path[:-1]:
        values = values[part]
    del values[path[-1]]


@pytest.mark.parametrize("path", [
    ("dtype",), ("tokenizer",), ("tokenizer", "sha256"), ("shards",), ("shards", 0, "sha256"), ("shards", 0, "tokens")],
    ids=str)
def test_a_manifest_that_lacks_something(copy: Path, path: tuple) -> None:
    edit(copy, lambda values: remove_key(values, path))
    with pytest.raises(CorpusError, match=str(path[-1])):
        TokenCorpus(copy)


def test_a_manifest_whose_checksum_or_count_differs(copy: Path) -> None:
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        "the shard's hash": lambda values: values["shards"][0].update(sha256="0" * 64),
        "the tokenizer's hash": lambda values: values["tokenizer"].update(sha256="0" * 64),
        "one token more": lambda values: values["shards"][0].update(tokens=values["shards"][0]["tokens"] + 1),
        "one token less": lambda values: values["shards"][0].update(tokens=values["shards"][0]["tokens"] - 1),
        "twice as wide": lambda values: values.update(dtype="uint32"),
    }
    for name, change in changes.items():
        damaged = Path(shutil.copytree(copy, copy.with_name(name)))
        edit(damaged, change)
        with pytest.raises(CorpusError):
            TokenCorpus(damaged)


@pytest.mark.parametrize("change", ["a shard is not listed", "a shard is listed twice", "a total differs"])
def test_a_manifest_that_contradicts_itself(cut_small: Path, tmp_path: Path, change: str) -> None:
    # Every hash is right, but tokens are lost or doubled, and bits per byte would be wrong without a word.
    folder = Path(shutil.copytree(cut_small, tmp_path / "copy"))

    def contradict(values: dict[str, Any]) -> None:
        if change == "a shard is not listed":
            values["shards"].pop(2)
        elif change == "a shard is listed twice":
            values["shards"].append(values["shards"][0])
        else:
            values["splits"]["train"]["tokens"] += 1

    edit(folder, contradict)
    with pytest.raises(CorpusError):
        TokenCorpus(folder)


def test_no_corpus_at_all(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CorpusError, match="data prepare"):
            TokenCorpus(folder)
