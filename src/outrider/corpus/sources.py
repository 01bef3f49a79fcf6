"""Where documents come from. Every source is read as a stream and can be read again.

A source is named by one string: `stdlib`, `books`, a folder, a file, or `hf:owner/name[:split]`.
"""

from __future__ import annotations

import gzip
import io
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import IO, Any, Literal

import zstandard

from outrider.errors import MissingExtraError, SourceError, first_line

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")
TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".tex", ".html", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".rs", ".go", ".java",
    ".js", ".ts", ".sh", ".toml", ".yaml", ".yml", ".json", ".sql", ".rb", ".php", ".swift", ".kt", ".scala", ".lua",
)
_NOT_OUR_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

BadText = Literal["error", "replace", "skip"]


@dataclass(frozen=True)
class Document:
    """One text and where it was found (`path` or `path:line`)."""

    text: str
    origin: str


@dataclass(frozen=True)
class Source:
    """A stream of documents.

    Attributes:
        spec: `stdlib`, `books`, a path, or `hf:owner/name[:split]`.
        text_field: the field that holds the text in `.jsonl`, parquet and hub data sets.
        licence: licence of the texts, recorded in the manifest.
        bad_text: what to do with bytes that are not UTF-8: stop, put U+FFFD in their place, or skip the document.
    """

    spec: str
    text_field: str = "text"
    licence: str = "unknown"
    bad_text: BadText = "error"
    skipped: list[str] = field(default_factory=list, compare=False)

    def documents(self) -> Iterator[Document]:
        """Yield every document that has text, in a fixed order.

        Raises:
            SourceError: missing, empty, damaged, of the wrong kind, or not UTF-8.
        """
        self.skipped.clear()
        found = False
        for document in self._open():
            if document.text.strip():
                found = True
                yield document
        if not found:
            raise SourceError(f"source '{self.spec}' holds no text")

    def _open(self) -> Iterator[Document]:
        if self.spec == "stdlib":
            return self._files(standard_library_files())
        if self.spec == "books":
            return self._books()
        if self.spec.startswith("hf:"):
            return self._hub(self.spec.removeprefix("hf:"))
        if not self.spec:
            raise SourceError("a source has no name; give a file, a folder, 'stdlib' or 'books'")
        path = Path(self.spec)
        if path.is_dir():
            files = [f for f in sorted(path.rglob("*")) if f.is_file() and _known(f) and not _hidden(f, path)]
            if not files:
                raise SourceError(f"folder {path} holds no text, .jsonl or parquet file")
            return self._files(files)
        if not path.exists():
            hint = f"; for a Hugging Face data set write hf:{self.spec}" if self.spec.count("/") == 1 else ""
            raise SourceError(f"no source '{self.spec}': not a file, a folder, 'stdlib' or 'books'{hint}")
        return self._files([path])

    def _files(self, files: list[Path]) -> Iterator[Document]:
        for path in files:
            try:
                if path.name.endswith(JSONL_SUFFIXES):
                    yield from self._jsonl(path)
                elif path.suffix == ".parquet":
                    yield from self._parquet(path)
                else:
                    yield from self._decode(path.read_bytes(), str(path))
            except OSError as error:
                raise SourceError(f"cannot read {path}: {error.strerror or error}") from error

    def _jsonl(self, path: Path) -> Iterator[Document]:
        try:
            with _open_binary(path) as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield from self._row(line, f"{path}:{number}")
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise SourceError(f"{path} is damaged or cut short: {error}") from error

    def _row(self, line: bytes, origin: str) -> Iterator[Document]:
        for document in self._decode(line, origin):
            try:
                row = json.loads(document.text)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{origin} is not JSON: {error}") from error
            yield Document(self._field(row, origin), origin)

    def _field(self, row: Any, origin: str) -> str:
        value = row.get(self.text_field) if isinstance(row, dict) else None
        if not isinstance(value, str):
            fields = ", ".join(map(str, row)) if isinstance(row, dict) else "it is not an object"
            raise SourceError(
                f"{origin} has no text in field '{self.text_field}' (fields: {fields}); see --text-field"
            )
        # JSON may carry lone surrogates, which no UTF-8 text holds.
        return value.encode("utf-8", "replace").decode("utf-8")

    def _parquet(self, path: Path) -> Iterator[Document]:
        try:
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise MissingExtraError("pyarrow", "data", f"reading {path}") from error
        try:
            with parquet.ParquetFile(path) as file:
                if self.text_field not in file.schema_arrow.names:
                    names = ", ".join(file.schema_arrow.names)
                    raise SourceError(f"{path} has no column '{self.text_field}' (columns: {names}); see --text-field")
                if not _is_text(arrow, file.schema_arrow.field(self.text_field).type):
                    raise SourceError(f"{path} has no text in field '{self.text_field}': the column holds something "
                                      "else; see --text-field")
                number = 0
                for batch in file.iter_batches(columns=[self.text_field]):
                    # As bytes, so that text that is not UTF-8 meets the same rule as elsewhere.
                    for value in batch.column(0).cast(arrow.large_binary()).to_pylist():
                        number += 1
                        if value is not None:
                            yield from self._decode(value, f"{path}:{number}")
        except (arrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
            raise SourceError(f"{path} is not a readable parquet file: {first_line(error)}") from error

    def _hub(self, name: str) -> Iterator[Document]:
        try:
            import datasets  # pyright: ignore[reportMissingImports] - an extra
        except ImportError as error:
            raise MissingExtraError("datasets", "data", f"the Hugging Face data set {name}") from error
        name, _, split = name.partition(":")
        try:
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
            for number, row in enumerate(rows):
                yield Document(self._field(row, f"hf:{name}:{number}"), f"hf:{name}:{number}")
        except SourceError:
            raise
        except Exception as error:  # the library raises many kinds; the reason is in the first line
            raise SourceError(f"cannot read the data set hf:{name}: {first_line(error)}") from error

    def _books(self) -> Iterator[Document]:
        packed = resources.files("outrider.corpus").joinpath("books.jsonl.gz").read_bytes()
        for line in gzip.decompress(packed).splitlines():
            row = json.loads(line)
            yield Document(row["text"], f"books/{row['title']}")

    def _decode(self, raw: bytes, origin: str) -> Iterator[Document]:
        if b"\0" in raw:
            raise SourceError(f"{origin} is not text: it has a zero byte at {raw.index(0)}")
        try:
            yield Document(raw.decode("utf-8-sig"), origin)
        except UnicodeDecodeError as error:
            if self.bad_text == "error":
                raise SourceError(
                    f"{origin} is not UTF-8 (byte {error.start}); convert it or pass --bad-text replace or skip"
                ) from error
            if self.bad_text == "replace":
                yield Document(raw.decode("utf-8-sig", "replace"), origin)
            else:
                self.skipped.append(origin)


def standard_library_files() -> list[Path]:
    """Return the running Python's own library source, without its tests and without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [f for f in sorted(root.rglob("*.py")) if not _NOT_OUR_SOURCE & set(f.relative_to(root).parts)]
    if not files:
        raise SourceError(f"this Python's library folder {root} holds no source")
    # Encoded in other than UTF-8 by design (tests of the tokenizer and of codecs), or a bare fragment.
    return [f for f in files if _is_utf8(f)]


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_text(arrow: Any, kind: Any) -> bool:
    return any(check(kind) for check in (
        arrow.types.is_string, arrow.types.is_large_string, arrow.types.is_string_view,
        arrow.types.is_binary, arrow.types.is_large_binary))


class _ZstdFile(io.RawIOBase):
    """Decompressed bytes of a `.zst` file, over all its frames; unlike the library's own reader it says
    when the last frame is cut short.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 20)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_binary(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path), 1 << 20)
    return path.open("rb")


def _known(path: Path) -> bool:
    return path.name.endswith(JSONL_SUFFIXES) or path.suffix in (".parquet", *TEXT_SUFFIXES)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)
