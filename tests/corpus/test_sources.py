"""Where documents come from: every kind of source gives the same documents, twice, in one order."""

from __future__ import annotations

import gzip
import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from outrider.corpus import Document, Source
from outrider.errors import MissingExtraError, SourceError

TEXTS = ["one\ntwo", "drei äöü", "四 🙂\t", "  five  ", "six\r\nseven"]


def texts(spec: object, **options: Any) -> list[str]:
    return [document.text for document in Source(str(spec), **options).documents()]


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def rows(field: str = "text") -> list[dict[str, Any]]:
    return [{field: text, "other": number, "nested": {field: "no"}} for number, text in enumerate(TEXTS)]


def write_plain(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def write_gzip(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data))


def write_zstd(path: Path, data: bytes) -> None:
    path.write_bytes(zstandard.ZstdCompressor(write_checksum=True).compress(data))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, bytes], None]] = {
    "a.jsonl": write_plain, "a.jsonl.gz": write_gzip, "a.jsonl.zst": write_zstd}


# Every kind of file.


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("field", ["text", "content"])
def test_json_lines(tmp_path: Path, name: str, field: str) -> None:
    WRITERS[name](tmp_path / name, jsonl(rows(field)))
    source = Source(str(tmp_path / name), text_field=field)
    first = list(source.documents())
    assert [document.text for document in first] == TEXTS
    assert [document.origin for document in first] == [f"{tmp_path / name}:{n}" for n in range(1, len(TEXTS) + 1)]
    assert list(source.documents()) == first


@pytest.mark.parametrize("field", ["text", "content"])
def test_parquet(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [*rows(field), {field: None, "other": 9, "nested": {field: "no"}}])
    source = Source(str(path), text_field=field)
    first = list(source.documents())
    assert [document.text for document in first] == TEXTS  # a null is no document
    assert list(source.documents()) == first


@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.md", "noextension", "a.unknown"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(TEXTS[0].encode())
    assert list(Source(str(tmp_path / name)).documents()) == [Document(TEXTS[0], str(tmp_path / name))]


def test_a_folder_is_read_whole_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    # Made in another order than they are read in.
    (tmp_path / "c.txt").write_text("c")
    write_parquet(tmp_path / "d.parquet", [{"text": "d1"}, {"text": "d2"}])
    (tmp_path / "b" / "a.py").write_text("b/a")
    write_gzip(tmp_path / "b" / "z.jsonl.gz", jsonl([{"text": "b/z"}]))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")  # a folder may hold other things
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / ".dot.txt").write_text("hidden")
    source = Source(str(tmp_path))
    assert texts(tmp_path) == ["a", "b/a", "b/z", "c", "d1", "d2"]
    assert list(source.documents()) == list(source.documents())


def test_two_iterations_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    write_zstd(tmp_path / "a.jsonl.zst", jsonl(rows()))
    source = Source(str(tmp_path))
    assert [(a.text, b.text) for a, b in zip(source.documents(), source.documents(), strict=True)] == [
        (text, text) for text in TEXTS]


def test_many_gzip_members_and_zstd_frames(tmp_path: Path) -> None:
    # Appending to a compressed log is ordinary; reading must not stop after the first part.
    parts = [jsonl([{"text": f"part {number}"}]) for number in range(3)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))
    assert texts(tmp_path) == ["part 0", "part 1", "part 2"] * 2


def test_blank_lines_and_blank_documents_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "x"}\n   \n{"text": " \\n "}\n{"text": ""}\r\n{"text": "y"}')
    documents = list(Source(str(tmp_path / "a.jsonl")).documents())
    assert [(document.text, document.origin.rsplit(":", 1)[1]) for document in documents] == [("x", "2"), ("y", "6")]


# Characters.


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + ("x\ufeffy".encode() if name == "a.txt" else jsonl([{"text": "x\ufeffy"}]))
    WRITERS.get(name, write_plain)(tmp_path / name, data)
    assert texts(tmp_path / name) == ["x\ufeffy"]  # only the leading one is a mark


@pytest.mark.parametrize("text", ["\\ud800", "a\\udfffb", "\\ud83dx\\ude42", "\\ude42\\ud83d"])
def test_a_lone_surrogate_in_json_becomes_encodable(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "start {text} end"}}\n')
    (found,) = texts(tmp_path / "a.jsonl")
    found.encode()  # raises if a surrogate is left
    assert found.startswith("start ")
    assert found.endswith(" end")


def test_a_surrogate_pair_in_json_is_one_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude42"}\n')
    assert texts(tmp_path / "a.jsonl") == ["🙂"]


BAD = {"a.txt": b"caf\xe9 latin", "a.jsonl": b'{"text": "caf\xe9 latin"}\n'}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_stops_by_default(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    with pytest.raises(SourceError, match="not UTF-8") as caught:
        texts(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "--bad-text" in str(caught.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_text_may_be_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BAD[name])
    assert texts(tmp_path / name, bad_text="replace") == ["caf\ufffd latin"]


def test_bad_text_may_be_skipped_and_is_counted(tmp_path: Path) -> None:
    for name, data in BAD.items():
        (tmp_path / name).write_bytes(data + (jsonl([{"text": "good"}]) if name == "a.jsonl" else b""))
    source = Source(str(tmp_path), bad_text="skip")
    for _ in range(2):  # the count is of one reading, not of all
        assert [document.text for document in source.documents()] == ["good"]
        assert source.skipped == [f"{tmp_path / 'a.jsonl'}:1", str(tmp_path / "a.txt")]


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_cut_at_the_end_is_bad_text(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.txt").write_bytes(("x" + "🙂").encode()[:-cut])
    with pytest.raises(SourceError, match="not UTF-8"):
        texts(tmp_path / "a.txt")


# Built-ins.


def test_the_books_are_real_and_small() -> None:
    documents = list(Source("books").documents())
    assert sum(len(document.text.encode()) for document in documents) < 1_000_000
    assert len(documents) > 10
    assert "Alice" in documents[0].text
    assert len({document.text for document in documents}) == len(documents)
    assert list(Source("books").documents()) == documents


def test_the_standard_library_is_this_pythons_own() -> None:
    documents = list(Source("stdlib").documents())
    by_name = {Path(document.origin).name: document.text for document in documents}
    assert by_name["argparse.py"] == Path(sys.modules["argparse"].__file__ or "").read_text(encoding="utf-8")
    assert len(documents) > 300
    parts = {part for document in documents for part in Path(document.origin).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    origins = [document.origin for document in documents]
    assert origins == sorted(origins, key=Path)


@pytest.mark.parametrize("spec", ["books", "stdlib"])
def test_built_ins_need_no_network(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a built-in source opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    assert next(Source(spec).documents()).text


# Hugging Face data sets, through a stand-in for the `datasets` package.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict]]:
    """Put a `datasets` module in place whose data sets are read from memory; return the calls it got."""
    calls: list[tuple[tuple, dict]] = []

    def load_dataset(*args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        calls.append((args, options))
        if args[0] == "no/such":
            raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub\nmore lines\nof detail")
        return iter([{"text": text, "content": text.upper(), "n": n} for n, text in enumerate(TEXTS)])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_hub_data_set(hub: list[tuple[tuple, dict]]) -> None:
    source = Source("hf:owner/name")
    first = list(source.documents())
    assert [document.text for document in first] == TEXTS
    assert list(source.documents()) == first
    for args, options in hub:
        assert args == ("owner/name",)
        assert options["split"] == "train"
        assert options["streaming"] is True  # nobody wants a terabyte on disk first


def test_a_hub_data_sets_split_and_field(hub: list[tuple[tuple, dict]]) -> None:
    assert texts("hf:owner/name:test", text_field="content") == [text.upper() for text in TEXTS]
    assert (hub[0][0], hub[0][1]["split"]) == (("owner/name",), "test")


def test_a_hub_data_set_that_fails_gives_one_line(hub: list[tuple[tuple, dict]]) -> None:
    with pytest.raises(SourceError, match="no/such") as caught:
        texts("hf:no/such")
    assert "\n" not in str(caught.value)


def test_a_hub_data_set_without_the_field(hub: list[tuple[tuple, dict]]) -> None:
    with pytest.raises(SourceError, match=r"body.*text, content, n"):
        texts("hf:owner/name", text_field="body")


@pytest.mark.parametrize(("package", "spec"), [("datasets", "hf:owner/name"), ("pyarrow", "a.parquet")])
def test_a_missing_extra_says_what_to_install(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, spec: str) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": "x"}])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # importing it now raises ImportError
    with pytest.raises(MissingExtraError, match=r"pip install 'outrider\[data\]'") as caught:
        texts(spec)
    assert package in str(caught.value)
    assert "\n" not in str(caught.value)


# What is refused. (The command line's side of it is in tests/test_bad_input.py.)


@pytest.mark.parametrize("spec", ["nothing", "no/such", "folder/no.txt", ""])
def test_a_missing_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.txt").write_text("an empty name (an unset shell variable) must not mean this folder")
    with pytest.raises(SourceError):
        texts(spec)


def test_a_missing_owner_and_name_hints_at_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="hf:no/such"):
        texts("no/such")


def empty_files() -> dict[str, bytes]:
    empty = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), empty)
    return {"a.txt": b"", "b.txt": b" \n\t\n", "c.jsonl": b"", "d.jsonl": b"\n\n", "e.jsonl": jsonl([{"text": ""}]),
            "f.jsonl.gz": gzip.compress(b""), "g.jsonl.zst": zstandard.compress(b""), "h.parquet": empty.getvalue()}


@pytest.mark.parametrize("name", empty_files())
def test_an_empty_source(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(empty_files()[name])
    for spec in (tmp_path / name, tmp_path):
        with pytest.raises(SourceError, match="no text"):
            texts(spec)


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(SourceError, match="holds no text"):
        texts(tmp_path)


@pytest.mark.parametrize("data", [b"\x7fELF\0\1", "utf-16".encode("utf-16"), b"\x89PNG\r\n\0"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_binary_file(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=r"not text|not UTF-8"):
        texts(tmp_path / name)


DEEP = b"[" * 100_000
BAD_LINES = [b'{"text": "x"', b"text", b'{"text": "x"} {"text": "y"}', b"{'text': 'x'}", b'{"text": x}', DEEP,
             b'{"text": "y", "deep": ' + DEEP + b"}"]
BAD_ROWS = [b'"text"', b"[]", b'["text"]', b"null", b"3", b"{}", b'{"Text": "x"}', b'{"text": null}', b'{"text": 3}',
            b'{"text": ["x"]}', b'{"text": {"text": "x"}}']


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_line_that_is_not_json(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(SourceError) as caught:
        texts(tmp_path / "a.jsonl")
    assert f"{tmp_path / 'a.jsonl'}:2" in str(caught.value)
    assert len(str(caught.value)) < 500  # one line for a person, not the file again


@pytest.mark.parametrize("line", BAD_ROWS)
def test_a_line_without_the_text(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(SourceError, match="no text in field 'text'") as caught:
        texts(tmp_path / "a.jsonl")
    assert f"{tmp_path / 'a.jsonl'}:2" in str(caught.value)
    assert "--text-field" in str(caught.value)


def many_lines() -> bytes:
    return jsonl([{"text": f"line {number} of a longer file"} for number in range(20)])


def test_a_gzip_file_cut_anywhere(tmp_path: Path) -> None:
    whole = gzip.compress(many_lines())
    path = tmp_path / "a.jsonl.gz"
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError):
            texts(path)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("blocks", ["one block", "a block a line"])
def test_a_zstd_file_cut_anywhere(tmp_path: Path, checksum: bool, blocks: str) -> None:
    # A file cut where a line ends looks complete after decompression; only the frame's end tells.
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor(write_checksum=checksum).stream_writer(buffer, closefd=False) as writer:
        for line in many_lines().splitlines(keepends=True):
            writer.write(line)
            if blocks == "a block a line":
                writer.flush(zstandard.FLUSH_BLOCK)
    whole = buffer.getvalue()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(whole)
    assert len(texts(path)) == 20
    accepted = {}
    for size in range(1, len(whole)):
        path.write_bytes(whole[:size])
        try:
            accepted[size] = len(texts(path))
        except SourceError:
            continue
    assert accepted == {}  # bytes kept -> documents read without a complaint


def test_a_second_zstd_frame_cut_short(tmp_path: Path) -> None:
    frame = zstandard.compress(many_lines())
    path = tmp_path / "a.jsonl.zst"
    for size in range(len(frame) + 1, 2 * len(frame)):
        path.write_bytes((frame + frame)[:size])
        with pytest.raises(SourceError):
            texts(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("data", [b"plain text", many_lines(), b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd"])
def test_a_file_that_is_not_what_its_name_says(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError) as caught:
        texts(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_compressed_data(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        WRITERS[name](tmp_path / name, many_lines())
        whole = (tmp_path / name).read_bytes()
        for place in range(len(whole) // 2, len(whole)):
            damaged = bytearray(whole)
            damaged[place] ^= 0x55
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(SourceError):
                texts(tmp_path / name)


def test_a_parquet_file_cut_or_damaged_anywhere(tmp_path: Path) -> None:
    # No checksums by default, so damage may go unseen; but it never ends in another kind of error.
    path = tmp_path / "a.parquet"
    write_parquet(path, [{"text": f"row {number}"} for number in range(5)])
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError):
            texts(path)
    messages = []
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        try:
            texts(path)
        except SourceError as error:
            messages.append(str(error))
    assert messages
    assert [message for message in messages if "\n" in message] == []


def bad_utf8_parquet(path: Path) -> None:
    raw = pyarrow.array([b"good", b"caf\xe9"], pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())  # written without being checked
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bad_utf8_parquet(path)
    with pytest.raises(SourceError, match="not UTF-8"):
        texts(path)
    assert texts(path, bad_text="replace") == ["good", "caf\ufffd"]
    source = Source(str(path), bad_text="skip")
    assert [document.text for document in source.documents()] == ["good"]
    assert source.skipped == [f"{path}:2"]


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"body": "x", "n": 1}])
    with pytest.raises(SourceError, match=r"no column 'text' \(columns: body, n\)"):
        texts(tmp_path / "a.parquet")


def test_a_parquet_column_of_numbers(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"text": 5}])
    with pytest.raises(SourceError, match="no text in field 'text'"):
        texts(tmp_path / "a.parquet")
