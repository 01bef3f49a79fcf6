"""Errors a user can cause.

Each message is one line that says what is wrong, where, and what to do. The command line prints it
without a traceback and exits with code 2 (`--debug` shows the traceback).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OutriderError(Exception):
    """Base of every error whose cause is the input or the machine, not a defect of Outrider."""


class SourceError(OutriderError):
    """A document source is missing, empty, of the wrong kind, or not valid UTF-8."""


class TokenizerError(OutriderError):
    """A tokenizer file is missing, damaged, or disagrees with its partner."""


class CorpusError(OutriderError):
    """A folder of token shards is incomplete, altered or truncated."""


class ConfigError(OutriderError):
    """A model shape or recipe has an unknown key or an impossible value."""


class ModelFolderError(OutriderError):
    """A Hugging Face model folder lacks a file or holds a damaged one."""


class SnapshotError(OutriderError):
    """A training snapshot is missing, damaged, or belongs to another run."""


class NonFiniteLossError(OutriderError):
    """The training loss or gradient became NaN or infinite."""


class DecodingError(OutriderError):
    """A generation request cannot be served: bad parameter, overflow, or mismatched models."""


class DiskError(OutriderError):
    """Writing failed for lack of space or permission; nothing half-written is left behind."""


class MissingExtraError(OutriderError):
    """An optional dependency is needed for this and is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}': pip install 'outrider[{extra}]'")


class Interrupted(OutriderError):  # noqa: N818 - not a fault
    """A signal ended the work after its state was saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def first_line(error: BaseException) -> str:
    """Return the first line of what a library's error says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` met while writing `path` into a one-line `DiskError`."""
    try:
        yield
    except OSError as error:
        reason = {
            errno.ENOSPC: "the disk is full; free some space or choose another folder",
            errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.EACCES: "permission denied; choose a folder you may write to",
            errno.EPERM: "permission denied; choose a folder you may write to",
            errno.EEXIST: "a file is where a folder should be; choose another folder",
            errno.ENOTDIR: "a file is where a folder should be; choose another folder",
            errno.ENAMETOOLONG: "the name is too long; choose another folder",
        }.get(error.errno or 0)
        if reason is None:
            raise
        raise DiskError(f"cannot write {path}: {reason}") from error
