"""Documents to token shards."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from outrider.console import Silent, Watcher, count, size
from outrider.corpus.shards import (
    MANIFEST,
    Manifest,
    ShardWriter,
    SourceRecord,
    Split,
    SplitRecord,
    TokenizerRecord,
    token_dtype,
)
from outrider.corpus.sources import Document, Source
from outrider.corpus.tokenizer import Tokenizer
from outrider.errors import CorpusError, SourceError, TokenizerError
from outrider.files import atomic_folder, write_json

#: Characters handed to the tokenizer at once: enough documents to keep every thread busy.
BATCH_CHARACTERS = 1 << 21
ENCODING_AT_ONCE = 2
#: A trained vocabulary sees at most this many characters, taken evenly from all sources.
BPE_SAMPLE_CHARACTERS = 64 << 20
SHARD_TOKENS = 1 << 26
SPLITS: tuple[Split, ...] = ("train", "validation")


def prepare(
    sources: Iterable[str | Source],
    output: str | Path,
    *,
    tokenizer: str | Path | Tokenizer = "bpe:4096",
    validation: float = 0.01,
    shard_tokens: int = SHARD_TOKENS,
    replace: bool = False,
    watcher: Watcher | None = None,
) -> Manifest:
    """Tokenise documents into a corpus folder: shards, manifest and tokenizer. Atomic.

    A document becomes the ids its tokenizer gives (with the tokenizer's own BOS, if any) followed by EOS,
    unless the two are one token, which then stands at the start.

    Args:
        sources: names as `Source.spec` takes them, or `Source`s.
        output: the folder to make.
        tokenizer: a `tokenizer.json`, a SentencePiece `.model`, a folder with either, `bpe:SIZE` to train a
            byte-level BPE on these documents, or a `Tokenizer`.
        validation: share of documents held out, chosen by a hash of their text, so that equal documents
            are never on both sides and the choice does not depend on order.
        shard_tokens: most tokens in one file.
        replace: whether an existing `output` may be replaced.
        watcher: told of progress.

    Returns:
        The manifest that was written.

    Raises:
        SourceError: a source is missing, empty, damaged or not text, or nothing is left to train on.
        TokenizerError: the tokenizer cannot be read.
        DiskError: `output` exists, or the disk is full; nothing half-written is left.
    """
    watcher = watcher or Silent()
    sources = [Source(source) if isinstance(source, str) else source for source in sources]
    if not sources:
        raise SourceError("no source given; name a file, a folder, 'stdlib' or 'books'")
    if shard_tokens < 1:
        raise CorpusError(f"a shard holds at least 1 token, not {shard_tokens}; see --shard-tokens")
    if not 0 <= validation < 1:
        raise SourceError(f"the validation share must be at least 0 and below 1, not {validation}")
    with atomic_folder(Path(output), replace=replace) as staging:
        tokens = _tokenizer(tokenizer, sources, watcher)
        tokens.save(staging)
        record = TokenizerRecord(file="tokenizer.json", sha256=tokens.sha256, vocab_size=tokens.vocab_size,
                                 bos_id=tokens.bos_id, eos_id=tokens.eos_id)
        work = _Preparation(tokens, validation, watcher)
        with ExitStack() as stack:
            writers: dict[Split, ShardWriter] = {split: stack.enter_context(
                ShardWriter(staging, split, token_dtype(tokens.vocab_size), shard_tokens)) for split in SPLITS}
            records = [work.run(source, writers) for source in sources]
        if not work.totals["train"].documents:
            raise SourceError("every document fell into the validation split; pass --validation 0 or more documents")
        manifest = Manifest(
            dtype=token_dtype(tokens.vocab_size), tokenizer=record, sources=tuple(records),
            splits={split: work.totals[split].record() for split in SPLITS},
            shards=tuple(shard for split in SPLITS for shard in writers[split].records))
        write_json(staging / MANIFEST, manifest.model_dump())
    return manifest


@dataclass
class _Totals:
    documents: int = 0
    bytes: int = 0
    tokens: int = 0

    def add(self, size_: int, tokens: int) -> None:
        self.documents += 1
        self.bytes += size_
        self.tokens += tokens

    def record(self) -> SplitRecord:
        return SplitRecord(documents=self.documents, bytes=self.bytes, tokens=self.tokens)


@dataclass
class _Encoded:
    """A batch of documents and their ids, one flat array cut at `ends`."""

    documents: list[Document]
    ids: np.ndarray
    ends: np.ndarray


@dataclass
class _Preparation:
    tokenizer: Tokenizer
    validation: float
    watcher: Watcher
    totals: dict[Split, _Totals] = field(default_factory=lambda: {split: _Totals() for split in SPLITS})
    started: float = field(default_factory=time.perf_counter)
    marks_start: bool = field(init=False)

    def __post_init__(self) -> None:
        self.marks_start = self.tokenizer.marks_start

    def run(self, source: Source, writers: dict[Split, ShardWriter]) -> SourceRecord:
        """Tokenise one source into `writers`."""
        mine = _Totals()
        for encoded in self._encode_ahead(_batches(source.documents())):
            begin = 0
            for document, end in zip(encoded.documents, encoded.ends, strict=True):
                raw = document.text.encode()
                split: Split = "validation" if _place(raw) < self.validation else "train"
                writers[split].write(encoded.ids[begin:end])
                self.totals[split].add(len(raw), int(end) - begin)
                mine.add(len(raw), int(end) - begin)
                begin = int(end)
            self._report()
        return SourceRecord(spec=source.spec, licence=source.licence, documents=mine.documents, bytes=mine.bytes,
                            tokens=mine.tokens, skipped_documents=len(source.skipped))

    def _encode_ahead(self, batches: Iterator[list[Document]]) -> Iterator[_Encoded]:
        """Keep batches in the tokenizer's hands while earlier ones are written: encoding frees Python's lock.

        With two at once, the threads that finish one batch early start on the next.
        """
        with ThreadPoolExecutor(ENCODING_AT_ONCE) as pool:
            pending: deque[Future[_Encoded]] = deque()
            for batch in batches:
                pending.append(pool.submit(self._encode, batch))
                if len(pending) > ENCODING_AT_ONCE:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _encode(self, documents: list[Document]) -> _Encoded:
        rows = self.tokenizer.encode_batch([document.text for document in documents])
        eos, bos = self.tokenizer.eos_id, self.tokenizer.bos_id
        if eos is not None and not (eos == bos and self.marks_start):
            for row in rows:
                row.append(eos)
        ends = np.cumsum([len(row) for row in rows])
        return _Encoded(documents, np.fromiter(chain.from_iterable(rows), np.uint32, int(ends[-1])), ends)

    def _report(self) -> None:
        tokens = sum(total.tokens for total in self.totals.values())
        raw = sum(total.bytes for total in self.totals.values())
        rate = tokens / (time.perf_counter() - self.started)
        self.watcher.update(raw, None, f"{size(raw)} read, {count(tokens)} tokens, {count(rate)} tokens/s")


def _tokenizer(choice: str | Path | Tokenizer, sources: list[Source], watcher: Watcher) -> Tokenizer:
    if isinstance(choice, Tokenizer):
        return choice
    name, _, wanted = str(choice).partition(":")
    if name != "bpe":
        return Tokenizer.load(choice)
    try:
        vocab_size = int(wanted or 4096)
    except ValueError as error:
        raise TokenizerError(f"'{choice}': write bpe:SIZE, for example bpe:4096") from error
    watcher.update(0, None, f"training a vocabulary of {vocab_size}")
    return Tokenizer.train_bpe(chain.from_iterable(_sample(source, len(sources)) for source in sources), vocab_size)


def _sample(source: Source, among: int) -> Iterator[str]:
    """Yield a source's texts until its share of the sample is used up."""
    left = BPE_SAMPLE_CHARACTERS // among
    for document in source.documents():
        yield document.text[:left]
        left -= len(document.text)
        if left <= 0:
            return


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def is_held_out(text: str, validation: float) -> bool:
    """Return whether `prepare` puts a document of this text into the validation split."""
    return _place(text.encode()) < validation


def _place(raw: bytes) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2**64
