"""Files and folders appear whole or not at all, whatever moment the work stops at."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from outrider.errors import DiskError
from outrider.files import atomic_folder, sha256_file, write_json, write_text_atomic


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def make(folder: Path, text: str, *, replace: bool = False) -> None:
    with atomic_folder(folder, replace=replace) as staging:
        (staging / "sub").mkdir()
        (staging / "a.txt").write_text(text)
        (staging / "sub" / "b.txt").write_text(text * 2)


def fail_half_way(folder: Path, error: BaseException, *, replace: bool) -> None:
    with atomic_folder(folder, replace=replace) as staging:
        (staging / "a.txt").write_text("half")
        raise error


def test_a_folder_takes_its_name_only_at_the_end(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "new") as staging:
        (staging / "a.txt").write_text("x")
        assert not (tmp_path / "deep" / "new").exists()
        assert staging.parent == tmp_path / "deep"  # beside it: a rename cannot cross file systems
    assert contents(tmp_path) == {"deep/new/a.txt": b"x"}
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "deep", "new"]


def test_a_folder_has_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    make(tmp_path / "made", "x")
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_an_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    make(tmp_path / "f", "old")
    before = contents(tmp_path)
    with pytest.raises(DiskError, match="exists already"):
        make(tmp_path / "f", "new")
    assert contents(tmp_path) == before
    make(tmp_path / "f", "new", replace=True)
    assert contents(tmp_path) == {"f/a.txt": b"new", "f/sub/b.txt": b"newnew"}


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1)])
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException, replace: bool) -> None:
    if replace:
        make(tmp_path / "f", "old")
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        fail_half_way(tmp_path / "f", error, replace=replace)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["f"] if replace else [])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_gives_one_line(tmp_path: Path, code: int) -> None:
    make(tmp_path / "f", "old")
    with pytest.raises(DiskError) as caught:
        fail_half_way(tmp_path / "f", OSError(code, os.strerror(code)), replace=True)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "f") in str(caught.value)
    assert contents(tmp_path) == {"f/a.txt": b"old", "f/sub/b.txt": b"oldold"}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("name", ["file.txt/sub", "file.txt/sub/deep", "x" * 300])
def test_a_place_where_no_folder_can_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("keep")
    with pytest.raises(DiskError):
        make(tmp_path / name, "new")
    assert contents(tmp_path) == {"file.txt": b"keep"}


# Runs in a process of its own, forks for every moment, and in the child stops dead (no clean-up, as SIGKILL
# or a power cut would) right before that moment's operation on the file system.
CRASHER = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from outrider.files import atomic_folder, write_text_atomic

    verb, target, moment = sys.argv[1], Path(sys.argv[2]), 0
    state = {"armed": False, "seen": 0, "stop_at": 0}

    def watch(event, arguments):
        if state["armed"] and event.split(".")[0] in ("os", "open", "shutil", "ctypes"):
            state["seen"] += 1
            if state["seen"] == state["stop_at"]:
                os._exit(9)

    sys.addaudithook(watch)

    def work():
        if verb == "folder":
            with atomic_folder(target, replace=True) as staging:
                (staging / "a.txt").write_text("new")
                (staging / "b.txt").write_text("new")
        else:
            write_text_atomic(target, "new")

    def whole():
        if verb != "folder":
            return target.read_text() if target.exists() else "missing"
        found = {p.name: p.read_text() for p in target.iterdir()} if target.exists() else {}
        known = {"old": {"a.txt": "old", "b.txt": "old"}, "new": {"a.txt": "new", "b.txt": "new"}}
        return next((name for name, files in known.items() if files == found), f"neither: {found}")

    def restore():
        if verb == "folder":
            for name in ("a.txt", "b.txt"):
                target.mkdir(exist_ok=True)
                (target / name).write_text("old")
        else:
            target.write_text("old")

    while True:
        moment += 1
        restore()
        child = os.fork()
        if child == 0:
            state.update(armed=True, stop_at=moment)
            work()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, whole())
        if code == 0:
            break
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("verb", ["folder", "file"])
def test_a_crash_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, verb: str) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHER, verb, str(tmp_path / "target")],
                          capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) > 3  # there were moments to stop at
    assert lines[-1] == "0 new"
    assert [line for line in lines if line.split()[1] not in ("old", "new")] == []


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "note.txt"
    write_text_atomic(path, "één")
    write_text_atomic(path, "tweë")
    assert path.read_bytes() == "tweë".encode()
    assert [entry.name for entry in path.parent.iterdir()] == ["note.txt"]


def test_a_full_disk_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "note.txt"
    write_text_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # where a file system with delayed allocation notices
    with pytest.raises(DiskError, match="disk is full"):
        write_text_atomic(path, "new")
    assert contents(tmp_path) == {"note.txt": b"old"}


def test_json_is_readable_and_not_escaped(tmp_path: Path) -> None:
    value = {"ключ": [1, 2.5, None, "日本"], "b": {"c": True}}
    write_json(tmp_path / "v.json", value)
    text = (tmp_path / "v.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "日本" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 1])
def test_hash_of_a_file(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
