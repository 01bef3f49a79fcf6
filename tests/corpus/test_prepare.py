"""Documents to shards: nothing lost, nothing twice, and whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from outrider.corpus import Manifest, Source, TokenCorpus, Tokenizer, prepare, verify_corpus
from outrider.errors import DiskError, SourceError, TokenizerError
from tests.conftest import TEXTS

MANY = [f"Document {number}: {'word ' * (number % 7)}é🙂\n" for number in range(400)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shard_ids(folder: Path, manifest: Manifest, split: str) -> np.ndarray:
    """Read a split with nothing but numpy, as the format's description promises one can."""
    width = {"uint16": "<u2", "uint32": "<u4"}[manifest.dtype]
    parts = [np.frombuffer((folder / shard.file).read_bytes(), width)
             for shard in manifest.shards if shard.split == split]
    return np.concatenate(parts) if parts else np.empty(0, width)


def documents_of(folder: Path, split: str) -> list[str]:
    """Cut a split back into the texts it was made from, at the marks of documents."""
    manifest, tokenizer = Manifest.load(folder), Tokenizer.load(folder)
    ids = shard_ids(folder, manifest, split)
    starts = np.flatnonzero(ids == manifest.tokenizer.bos_id)
    return [tokenizer.decode(part.tolist()) for part in np.split(ids, starts)[1:]]


# What is written.


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 1 << 20])
def test_the_documents_come_back(tmp_path: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
    texts = MANY[:6 * shard_tokens] if shard_tokens < 10 else MANY  # a file for every few tokens: keep them few
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare([str(source)], tmp_path / "out", tokenizer=tokenizer, validation=0.2, shard_tokens=shard_tokens)
    train, validation = (documents_of(tmp_path / "out", split) for split in ("train", "validation"))
    assert Counter(train + validation) == Counter(texts)
    # Within a split they stand in the source's order.
    assert train == [text for text in texts if text in set(train)]
    for shard in manifest.shards:
        last = [other for other in manifest.shards if other.split == shard.split][-1]
        assert shard.tokens == shard_tokens or (shard is last and 0 < shard.tokens < shard_tokens)
    assert len(manifest.shards) == sum(-(-total.tokens // shard_tokens) for total in manifest.splits.values())


def test_the_manifest_says_what_is_there(tmp_path: Path, tokenizer: Tokenizer) -> None:
    one = Source(str(write_jsonl(tmp_path / "a.jsonl", MANY)), licence="CC0-1.0")
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{number:02d}.py").write_text(text)
    (tmp_path / "texts" / "latin.txt").write_bytes(b"caf\xe9")
    two = Source(str(tmp_path / "texts"), licence="MIT", bad_text="skip")
    returned = prepare([one, two], tmp_path / "out", tokenizer=tokenizer, validation=0.3, shard_tokens=1000)
    manifest = Manifest.load(tmp_path / "out")
    assert manifest == returned
    assert manifest.dtype == "uint16"
    assert manifest.tokenizer.sha256 == tokenizer.sha256
    assert manifest.tokenizer.sha256 == hashlib.sha256((tmp_path / "out" / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest.tokenizer.vocab_size == tokenizer.vocab_size

    for split in ("train", "validation"):
        texts, total = documents_of(tmp_path / "out", split), manifest.splits[split]  # type: ignore[index]
        assert total.documents == len(texts) > 0
        assert total.bytes == sum(len(text.encode()) for text in texts)
        assert total.tokens == len(shard_ids(tmp_path / "out", manifest, split))
        assert total.tokens == sum(len(tokenizer.encode(text)) for text in texts)
    for record, source, texts in zip(manifest.sources, (one, two), (MANY, TEXTS), strict=True):
        assert (record.spec, record.licence) == (source.spec, source.licence)
        assert record.documents == len(texts)
        assert record.bytes == sum(len(text.encode()) for text in texts)
        assert record.tokens == sum(len(tokenizer.encode(text)) for text in texts)
    assert [record.skipped_documents for record in manifest.sources] == [0, 1]

    for shard in manifest.shards:
        raw = (tmp_path / "out" / shard.file).read_bytes()
        assert len(raw) == 2 * shard.tokens
        assert hashlib.sha256(raw).hexdigest() == shard.sha256
    listed = {shard.file for shard in manifest.shards} | {"manifest.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == listed
    verify_corpus(tmp_path / "out")


def word_level(size: int, marks: list[str] | None = None) -> Tokenizer:
    words = [*(marks or []), *(f"w{number}" for number in range(size - len(marks or [])))]
    backend = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend)


@pytest.mark.parametrize(("size", "dtype"), [
    (65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (70_000, "uint32")])
def test_ids_are_little_endian_and_wide_enough(tmp_path: Path, size: int, dtype: str) -> None:
    ids = [0, 1, 255, 256, 65_534, size - 1]
    (tmp_path / "a.txt").write_text(" ".join(f"w{number}" for number in ids))
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer=word_level(size), validation=0)
    assert manifest.dtype == dtype
    width = {"uint16": 2, "uint32": 4}[dtype]
    raw = b"".join(number.to_bytes(width, "little") for number in ids)
    assert (tmp_path / "out" / "train-00000.bin").read_bytes() == raw
    assert TokenCorpus(tmp_path / "out").read(0, 99).tolist() == ids


def with_marks(kind: str) -> tuple[Tokenizer, list[int]]:
    """Return a tokenizer and the ids it must give for the documents 'w0 w1' and 'w2'."""
    if kind == "neither":
        return word_level(9), [0, 1, 2]
    if kind == "EOS only":
        return word_level(9, ["</s>"]), [1, 2, 0, 3, 0]
    if kind == "BOS and EOS":
        tokenizer = word_level(9, ["<s>", "</s>"])
        tokenizer.backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)])
        return tokenizer, [0, 2, 3, 1, 0, 4, 1]
    tokenizer = word_level(9, ["<|endoftext|>"])  # one mark for both, put in front as our own BPE does
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return tokenizer, [0, 1, 2, 0, 3]


@pytest.mark.parametrize("kind", ["neither", "EOS only", "BOS and EOS", "one for both"])
def test_documents_are_marked(tmp_path: Path, kind: str) -> None:
    tokenizer, expected = with_marks(kind)
    source = write_jsonl(tmp_path / "a.jsonl", ["w0 w1", "w2"])
    manifest = prepare([str(source)], tmp_path / "out", tokenizer=tokenizer, validation=0)
    assert shard_ids(tmp_path / "out", manifest, "train").tolist() == expected
    assert (manifest.tokenizer.bos_id, manifest.tokenizer.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_one_mark_that_the_tokenizer_does_not_put_itself(tmp_path: Path) -> None:
    # As GPT-2's and SmolLM2's: <|endoftext|> is BOS and EOS, and the tokenizer adds neither. Documents must
    # not run together all the same.
    source = write_jsonl(tmp_path / "a.jsonl", ["w0 w1", "w2"])
    manifest = prepare([str(source)], tmp_path / "out", tokenizer=word_level(9, ["<|endoftext|>"]), validation=0)
    ids = shard_ids(tmp_path / "out", manifest, "train").tolist()
    assert [token for token in ids if token] == [1, 2, 3]
    assert 0 in ids[2:-1]


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", MANY))
    for name in ("one", "two"):
        prepare([source], tmp_path / name, tokenizer="bpe:300", validation=0.1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("choice", ["folder", "file", "object", "bpe:300"])
def test_ways_to_name_a_tokenizer(tmp_path: Path, tokenizer: Tokenizer, text_folder: Path, choice: str) -> None:
    tokenizer.save(tmp_path / "tok")
    named: Any = {"folder": tmp_path / "tok", "file": str(tmp_path / "tok" / "tokenizer.json"), "object": tokenizer}
    manifest = prepare([str(text_folder)], tmp_path / "out", tokenizer=named.get(choice, choice))
    assert manifest.tokenizer.sha256 == tokenizer.sha256  # trained on the same texts, bpe:300 is the same one


def test_many_batches_keep_the_order(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Batches are encoded ahead on other threads; they must still be written in order.
    monkeypatch.setattr(importlib.import_module("outrider.corpus.prepare"), "BATCH_CHARACTERS", 50)
    source = str(write_jsonl(tmp_path / "a.jsonl", MANY))
    prepare([source], tmp_path / "out", tokenizer=tokenizer, validation=0)
    assert documents_of(tmp_path / "out", "train") == MANY


# The validation split.


def splits(tmp_path: Path, texts: list[str], tokenizer: Tokenizer, name: str,
           validation: float = 0.2) -> list[list[str]]:
    source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
    prepare([str(source)], tmp_path / name, tokenizer=tokenizer, validation=validation)
    return [documents_of(tmp_path / name, split) for split in ("train", "validation")]


def test_the_choice_does_not_depend_on_order_or_company(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train, validation = splits(tmp_path, MANY, tokenizer, "forwards")
    assert set(train).isdisjoint(validation)
    backwards = splits(tmp_path, MANY[::-1], tokenizer, "backwards")
    assert backwards == [train[::-1], validation[::-1]]
    half = splits(tmp_path, MANY[::2], tokenizer, "half")
    assert set(half[1]) == set(validation) & set(MANY[::2])


def test_equal_documents_are_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train, validation = splits(tmp_path, MANY[:100] * 3, tokenizer, "thrice")
    assert set(train).isdisjoint(validation)
    assert set(Counter(train + validation).values()) == {3}
    assert train
    assert validation


def test_a_larger_share_holds_the_smaller_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held = [set(splits(tmp_path, MANY, tokenizer, f"v{share}", share)[1]) for share in (0.0, 0.05, 0.2, 0.5)]
    assert held[0] == set()
    assert held[0] < held[1] < held[2] < held[3]
    for found, share in zip(held[1:], (0.05, 0.2, 0.5), strict=True):
        # Five standard deviations; the choice is a hash, so this cannot change from run to run.
        assert abs(len(found) - share * len(MANY)) < 5 * (share * (1 - share) * len(MANY)) ** 0.5


def test_everything_held_out_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held = splits(tmp_path, MANY, tokenizer, "all")[1]
    with pytest.raises(SourceError, match="--validation"):
        splits(tmp_path, held[:3], tokenizer, "only")
    assert not (tmp_path / "only").exists()


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_an_impossible_share(tmp_path: Path, text_folder: Path, tokenizer: Tokenizer, share: float) -> None:
    with pytest.raises(SourceError, match="validation"):
        prepare([str(text_folder)], tmp_path / "out", tokenizer=tokenizer, validation=share)


# In a process of its own: a shard that can hold nothing must not be filled for ever.
@pytest.mark.parametrize("tokens", [0, -1])
def test_an_impossible_shard_size(tmp_path: Path, text_folder: Path, tokens: int) -> None:
    script = textwrap.dedent("""
        import sys
        from outrider.corpus import prepare
        from outrider.errors import OutriderError
        try:
            prepare([sys.argv[1]], sys.argv[2], tokenizer="bpe:300", shard_tokens=int(sys.argv[3]))
        except OutriderError as error:
            sys.exit(2)
    """)
    command = [sys.executable, "-c", script, str(text_folder), str(tmp_path / "out"), str(tokens)]
    with subprocess.Popen(command) as process:
        try:
            code = process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            pytest.fail(f"shard_tokens={tokens} never ends")
    assert code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("choice", ["bpe:0", "bpe:256", "bpe:-5", "bpe:many", "bpe:1.5", "no/such.json", "bpe:4k x"])
def test_an_impossible_tokenizer(tmp_path: Path, text_folder: Path, choice: str) -> None:
    with pytest.raises(TokenizerError):
        prepare([str(text_folder)], tmp_path / "out", tokenizer=choice)
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_beyond_all_memory(tmp_path: Path, text_folder: Path) -> None:
    # The trainer reserves room for it and takes the process down, so this too runs in one of its own.
    command = [sys.executable, "-m", "outrider", "data", "prepare", str(text_folder), "--out", str(tmp_path / "out"),
               "--tokenizer", "bpe:99999999999"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, f"exit code {done.returncode} ({-signal.SIGABRT} is an abort)"
    assert list(tmp_path.iterdir()) == []


def test_no_source_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no source"):
        prepare([], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Whole or not at all.


def break_source(folder: Path) -> Path:
    """Make a source that fails only after many good documents."""
    write_jsonl(folder / "a.jsonl", MANY)
    with (folder / "a.jsonl").open("a") as file:
        file.write("not JSON\n")
    return folder / "a.jsonl"


class Stop(BaseException):
    """What a signal handler may raise."""


def fail_in_watcher(error: BaseException) -> Any:
    class Failing:
        def update(self, done: float, total: float | None, note: str) -> None:
            raise error

    return Failing()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("how", ["source", "watcher", "interrupt"])
def test_a_failure_on_the_way_leaves_things_as_they_were(
        tmp_path: Path, tokenizer: Tokenizer, replace: bool, how: str) -> None:
    (tmp_path / "in").mkdir()
    work = tmp_path / "work"
    work.mkdir()
    good = str(write_jsonl(tmp_path / "in" / "good.jsonl", MANY[:50]))
    if replace:
        prepare([good], work / "out", tokenizer=tokenizer)
    before = contents(work)
    options: dict[str, Any] = {"source": {}, "watcher": {"watcher": fail_in_watcher(ValueError("x"))},
                               "interrupt": {"watcher": fail_in_watcher(Stop())}}[how]
    expected: type[BaseException] = {"source": SourceError, "watcher": ValueError, "interrupt": Stop}[how]
    sources = [good, str(break_source(tmp_path / "in"))] if how == "source" else [good]
    with pytest.raises(expected):
        prepare(sources, work / "out", tokenizer=tokenizer, replace=replace, shard_tokens=100, **options)
    assert contents(work) == before
    assert [path.name for path in work.iterdir()] == (["out"] if replace else [])


def test_an_existing_output_is_kept_unless_told(tmp_path: Path, tokenizer: Tokenizer, text_folder: Path) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", MANY))
    prepare([source], tmp_path / "out", tokenizer=tokenizer)
    before = contents(tmp_path)
    with pytest.raises(DiskError, match="exists already"):
        prepare([str(text_folder)], tmp_path / "out", tokenizer=tokenizer)
    assert contents(tmp_path) == before
    prepare([str(text_folder)], tmp_path / "out", tokenizer=tokenizer, validation=0, replace=True)
    assert Counter(documents_of(tmp_path / "out", "train")) == Counter(TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


# A full disk.


def refuse_after(successes: int, real: Callable[[int], None]) -> Callable[[int], None]:
    left = [successes]

    def flush(handle: int) -> None:
        left[0] -= stat.S_ISREG(os.fstat(handle).st_mode)  # it is data that finds no room, not a name
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    return flush


def attempt_on_full_disk(work: Path, source: str, tokenizer: Tokenizer, **options: Any) -> str | None:
    """Prepare; on `DiskError` check that `work` is as it was and return the message, else None."""
    before = contents(work), sorted(path.name for path in work.iterdir())
    try:
        prepare([source], work / "out", tokenizer=tokenizer, shard_tokens=3_000, **options)
    except DiskError as error:
        assert (contents(work), sorted(path.name for path in work.iterdir())) == before
        return str(error)
    return None


def fill_at_every_flush(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch,
                        **options: Any) -> list[str]:
    """Let every flush in turn meet the full disk, until there is none left to fail; return the messages."""
    source = str(write_jsonl(tmp_path / "a.jsonl", MANY))
    messages: list[str] = []
    real = os.fsync
    for successes in range(200):
        monkeypatch.setattr(os, "fsync", refuse_after(successes, real))
        message = attempt_on_full_disk(tmp_path / "work", source, tokenizer, **options)
        if message is None:
            return messages
        messages.append(message)
    pytest.fail("more flushes than there can be files")


@pytest.mark.parametrize("replace", [False, True])
def test_a_disk_that_fills_at_any_flush(
        tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, replace: bool) -> None:
    work = tmp_path / "work"
    work.mkdir()
    if replace:
        prepare([str(write_jsonl(tmp_path / "b.jsonl", MANY[:9]))], work / "out", tokenizer=tokenizer)
    messages = fill_at_every_flush(tmp_path, tokenizer, monkeypatch, replace=replace)
    manifest = Manifest.load(work / "out")
    assert len(messages) >= len(manifest.shards) + 3  # every file was flushed
    assert all("disk is full" in message and "\n" not in message for message in messages)
    assert manifest.splits["train"].documents > 300


def test_a_full_disk_is_told_by_the_name_the_user_gave(
        tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    for message in fill_at_every_flush(tmp_path, tokenizer, monkeypatch):
        assert str(tmp_path / "work" / "out") in message
        assert ".partial" not in message  # by now that one is gone


def test_a_disk_that_fills_while_shards_are_written(
        tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write_jsonl(tmp_path / "a.jsonl", MANY))
    work = tmp_path / "work"
    work.mkdir()
    real = Path.open

    class Full:
        """A file on a full disk: writing fails, and so does closing, as there is something left to write."""

        def __init__(self, file: IO[bytes]) -> None:
            self._file = file

        def write(self, raw: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self._file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = real(self, mode, *args, **options)
        return Full(file) if self.name == "train-00001.bin" and "w" in mode else file

    monkeypatch.setattr(Path, "open", open_)
    assert "disk is full" in (attempt_on_full_disk(work, source, tokenizer) or "no error")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a real file system of a few KiB; needs the right to mount."""
    mounted: list[Path] = []

    def mount(kib: int) -> Path:
        if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
            pytest.skip("mounting a small file system needs root")
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)],
                              capture_output=True, check=False)
        if done.returncode:
            pytest.skip("mounting a small file system is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kib", [4, 8, 12, 16, 20, 24, 32])
def test_a_real_disk_that_fills(
        tmp_path: Path, tokenizer: Tokenizer, small_disk: Callable[[int], Path], kib: int) -> None:
    # A disk of each size fills at another place: the tokenizer, a shard, the manifest.
    source = str(write_jsonl(tmp_path / "a.jsonl", MANY * 2))
    assert "disk is full" in (attempt_on_full_disk(small_disk(kib), source, tokenizer) or "no error")


def test_a_real_disk_that_fills_keeps_the_old_corpus(
        tmp_path: Path, tokenizer: Tokenizer, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(64)
    prepare([str(write_jsonl(tmp_path / "b.jsonl", MANY[:20]))], disk / "out", tokenizer=tokenizer, validation=0)
    more = str(write_jsonl(tmp_path / "a.jsonl", MANY * 4))
    assert "disk is full" in (attempt_on_full_disk(disk, more, tokenizer, replace=True) or "no error")
    assert documents_of(disk / "out", "train") == MANY[:20]
