"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outrider.errors import DiskError, disk_errors

_HASH_BLOCK = 1 << 22


@contextmanager
def atomic_folder(destination: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `destination` that takes its name once the block ends well.

    Everything in it is flushed to the disk before the rename, so after a crash at any moment
    `destination` is either the old folder or the complete new one. If the block raises, the
    temporary folder is removed and `destination` is untouched.

    Raises:
        DiskError: `destination` exists and `replace` is false, or the disk is full.
    """
    destination = Path(destination)
    with disk_errors(destination):
        if destination.exists() and not replace:
            raise DiskError(f"{destination} exists already; choose another folder or pass --force")
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        with disk_errors(destination):
            os.chmod(staging, 0o777 & ~_umask())  # noqa: PTH101 - mkdtemp makes it 0700
            yield staging
            _sync_tree(staging)
            _take_name(staging, destination)
    except DiskError as error:
        # Named as the user knows it: by now the temporary folder is of no interest.
        raise DiskError(str(error).replace(str(staging), str(destination))) from error
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` so that a reader sees the old content or the new, never a part."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as lower-case hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_name(staging: Path, destination: Path) -> None:
    """Give `staging` the name `destination`; an earlier folder of that name goes once the new one is there."""
    if not destination.exists():
        staging.rename(destination)
    elif not _exchange(staging, destination):
        # Where names cannot be exchanged in one step there is a moment without the folder.
        old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".old", dir=destination.parent))
        destination.rename(old / destination.name)
        try:
            staging.rename(destination)
        except OSError:
            (old / destination.name).rename(destination)
            raise
        finally:
            shutil.rmtree(old, ignore_errors=True)
    _sync(destination.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step (Linux's renameat2, macOS's renamex_np); False where there is no such call."""
    library = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    if hasattr(library, "renameat2"):
        here, exchange = -100, 2
        return library.renameat2(here, names[0], here, names[1], exchange) == 0  # type: ignore[union-attr]
    if hasattr(library, "renamex_np"):
        swap = 2
        return library.renamex_np(*names, swap) == 0  # type: ignore[union-attr]
    return False
