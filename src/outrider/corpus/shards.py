"""Token shards: flat little-endian integers, and a manifest that says what they are.

A corpus folder holds `manifest.json`, `tokenizer.json` and, for each split, `SPLIT-00000.bin` onwards.
See docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from outrider.errors import CorpusError
from outrider.files import sha256_file

MANIFEST = "manifest.json"
FORMAT = "outrider-tokens"
VERSION = 1
#: Up to this many bytes the hashes are checked whenever a corpus is opened; beyond, `outrider data verify` does it.
HASH_ON_OPEN_BYTES = 1 << 31

Split = Literal["train", "validation"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardRecord(_Record):
    """One file of tokens."""

    file: str
    split: Split
    tokens: int
    sha256: str


class SourceRecord(_Record):
    """One source, as it was read."""

    spec: str
    licence: str
    documents: int
    bytes: int
    tokens: int
    skipped_documents: int = 0


class SplitRecord(_Record):
    """Totals of one split. `bytes` are UTF-8 bytes of text, the denominator of bits per byte."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0


class TokenizerRecord(_Record):
    """The tokenizer whose ids the shards hold."""

    file: str
    sha256: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None


class Manifest(_Record):
    """Everything one needs to know to read the shards, and where they came from."""

    format: Literal["outrider-tokens"] = FORMAT
    version: Literal[1] = VERSION
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerRecord
    sources: tuple[SourceRecord, ...]
    splits: dict[Split, SplitRecord]
    shards: tuple[ShardRecord, ...]

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read `manifest.json` of a corpus folder.

        Raises:
            CorpusError: there is none, or it is damaged or of another version.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise CorpusError(f"{folder} is not a prepared corpus: it has no {MANIFEST}; run 'outrider data prepare'")
        try:
            manifest = cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise CorpusError(f"{path} is damaged: {key}: {first['msg']}") from error
        except ValueError as error:
            raise CorpusError(f"{path} is not valid JSON: {error}") from error
        manifest._check(path)
        return manifest

    def _check(self, path: Path) -> None:
        """Raise `CorpusError` if shards are listed twice, or do not add up to the totals."""
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise CorpusError(f"{path} is damaged: it lists a shard twice")
        for split, totals in self.splits.items():
            listed = sum(shard.tokens for shard in self.shards if shard.split == split)
            if listed != totals.tokens:
                raise CorpusError(f"{path} is damaged: the {split} shards have {listed} tokens, its total says "
                                  f"{totals.tokens}")


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the narrowest type that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes one split's tokens into files of at most `shard_tokens`, hashing as it goes."""

    def __init__(self, folder: Path, split: Split, dtype: Literal["uint16", "uint32"], shard_tokens: int) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.split: Split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._tokens = 0
        self.records: list[ShardRecord] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._close()

    def write(self, ids: np.ndarray) -> None:
        """Append `ids` [n]; a document may run over the end of a file into the next."""
        while len(ids):
            if self._file is None:
                self._file = (self.folder / self._name()).open("wb")
            part = ids[:self.shard_tokens - self._tokens]
            raw = part.astype(self._dtype, copy=False).tobytes()
            self._file.write(raw)
            self._hash.update(raw)
            self._tokens += len(part)
            ids = ids[len(part):]
            if self._tokens == self.shard_tokens:
                self._close()

    def _name(self) -> str:
        return f"{self.split}-{len(self.records):05d}.bin"

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self.records.append(ShardRecord(
            file=self._name(), split=self.split, tokens=self._tokens, sha256=self._hash.hexdigest()))
        self._file, self._tokens, self._hash = None, 0, hashlib.sha256()


class TokenCorpus:
    """One split of a prepared corpus as a single sequence of tokens, memory-mapped.

    Attributes:
        folder: the corpus folder.
        manifest: its manifest.
        split: which split this is.
    """

    def __init__(self, folder: str | Path, split: Split = "train", *, verify: bool | None = None) -> None:
        """Open a split.

        Args:
            folder: the corpus folder.
            split: `train` or `validation`.
            verify: whether to hash every file; by default, when they are small enough for it to be quick.
                Sizes are checked always.

        Raises:
            CorpusError: a file is missing, cut short or altered, or the tokenizer is not the one recorded.
        """
        self.folder = Path(folder)
        self.split: Split = split
        self.manifest = Manifest.load(folder)
        self._check_tokenizer()
        dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        records = [record for record in self.manifest.shards if record.split == split]
        if verify is None:
            verify = sum(record.tokens for record in records) * dtype.itemsize <= HASH_ON_OPEN_BYTES
        self._maps = [_map_shard(self.folder, record, dtype, verify) for record in records]
        self._ends = np.cumsum([record.tokens for record in records], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def totals(self) -> SplitRecord:
        """Documents, bytes and tokens of this split."""
        return self.manifest.splits.get(self.split, SplitRecord())

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token that is predicted (all but the first)."""
        return self.totals.bytes / max(1, len(self) - 1)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens `start` to `start + count` (fewer at the end) as int64 [n]."""
        stop = min(start + count, len(self))
        if not 0 <= start <= stop:
            raise IndexError(f"token {start} of {len(self)}")
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            begin = int(self._ends[shard]) - len(self._maps[shard])
            part = self._maps[shard][start - begin:stop - begin]
            parts.append(part)
            start += len(part)
            shard += 1
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def _check_tokenizer(self) -> None:
        record = self.manifest.tokenizer
        path = self.folder / record.file
        if not path.is_file():
            raise CorpusError(f"{self.folder} lacks its tokenizer {record.file}; prepare the corpus again")
        if sha256_file(path) != record.sha256:
            raise CorpusError(f"{path} is not the tokenizer the shards were made with: SHA-256 differs")


def verify_corpus(folder: str | Path) -> Manifest:
    """Hash every file of a corpus against its manifest; raise `CorpusError` at the first that differs."""
    manifest = Manifest.load(folder)
    for split in manifest.splits:
        TokenCorpus(folder, split, verify=True)
    return manifest


def _map_shard(folder: Path, record: ShardRecord, dtype: np.dtype, verify: bool) -> np.ndarray:
    path = folder / record.file
    if not path.is_file():
        raise CorpusError(f"{folder} lacks the shard {record.file}; prepare the corpus again")
    size, expected = path.stat().st_size, record.tokens * dtype.itemsize
    if size != expected:
        raise CorpusError(f"{path} has {size} bytes where {MANIFEST} says {expected}: it was cut short or altered")
    if verify and sha256_file(path) != record.sha256:
        raise CorpusError(f"{path} was altered: its SHA-256 differs from {MANIFEST}")
    return np.memmap(path, dtype=dtype, mode="r")
