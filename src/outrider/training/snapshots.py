"""Snapshots: everything needed to continue a run bit for bit, in a folder that is whole or absent.

`snapshots/step-00000100/` holds the tensors (torch.distributed.checkpoint in safetensors files: no pickle)
and `state.json` (step, position in the data, random state, the resolved recipe, and a SHA-256 of every
tensor file). The newest is found by listing; nothing points at it that could be stale.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from outrider.corpus.batches import Position
from outrider.errors import SnapshotError
from outrider.files import atomic_folder, sha256_file, write_json
from outrider.training.optimizers import Optimizers

_NAME = re.compile(r"step-(\d{8,})")
_STATE = "state.json"


@dataclass
class Progress:
    """Where a run stands, apart from tensors."""

    step: int = 0
    tokens: int = 0
    position: Position = field(default_factory=Position)
    seconds: float = 0.0
    loss: float = math.nan


class SnapshotStore:
    """The snapshots of one run."""

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def list(self) -> list[Path]:
        """Return the complete snapshots, oldest first. Unfinished ones have another name."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))

    def save(self, model: nn.Module, optimizer: Optimizers, progress: Progress,
             recipe: dict[str, Any], corpus_sha256: str) -> Path:
        """Write a snapshot, then remove the oldest beyond `keep`.

        Raises:
            DiskError: no room; earlier snapshots are as they were.
        """
        path = self.folder / f"step-{progress.step:08d}"
        for unfinished in self.folder.glob(".step-*.partial"):  # a process was killed while it saved
            shutil.rmtree(unfinished, ignore_errors=True)
        with atomic_folder(path, replace=True) as staging:
            tensors = _tensors(model, optimizer) | {"random.cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                tensors["random.cuda"] = torch.cuda.get_rng_state()
            with _quiet():
                _save(tensors, staging)
            state = {
                "format": "outrider-snapshot", "version": 1,
                "progress": asdict(progress), "recipe": recipe, "corpus_sha256": corpus_sha256,
                "files": {file.name: sha256_file(file) for file in sorted(staging.glob("*.safetensors"))},
            }
            write_json(staging / _STATE, {**state, "sha256": _digest(state)})
        others = [other for other in self.list() if other != path]  # a damaged one may have a later name
        for old in others[:len(others) - self.keep + 1]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest(self, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest undamaged snapshot and its state, or None if there is none at all.

        Args:
            warn: called with one line for each damaged snapshot that is passed over.

        Raises:
            SnapshotError: there are snapshots, and every one is damaged.
        """
        found = self.list()
        for path in reversed(found):
            try:
                return path, _read_state(path)
            except SnapshotError as error:
                warn(f"passing over a damaged snapshot: {error}")
        if found:
            raise SnapshotError(f"all {len(found)} snapshots in {self.folder} are damaged; pass --force to start anew")
        return None


def _save(tensors: dict[str, Tensor], folder: Path) -> None:
    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder)), no_dist=True)
    except CheckpointException as error:  # no Exception, and it hides what went wrong: most often a full disk
        for failure, _ in error.failures.values():
            raise failure from error
        raise


def restore(path: Path, state: dict[str, Any], model: nn.Module, optimizer: Optimizers) -> Progress:
    """Load tensors and random state from a snapshot in place; return where the run stood.

    Raises:
        SnapshotError: its tensors do not fit this model.
    """
    _materialise_state(optimizer)
    tensors = _tensors(model, optimizer) | {"random.cpu": torch.get_rng_state()}
    reader = dcp.HuggingFaceStorageReader(str(path))
    try:
        # A run that began where there was no GPU has no random state of one.
        if torch.cuda.is_available() and "random.cuda" in reader.read_metadata().state_dict_metadata:
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        with _quiet():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, ValueError, RuntimeError) as error:  # the first is no Exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise SnapshotError(f"{path} does not fit this model: {reason[-1]}") from error
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    progress = state["progress"]
    return Progress(progress["step"], progress["tokens"], Position(**progress["position"]), progress["seconds"],
                    progress["loss"])


def _tensors(model: nn.Module, optimizer: Optimizers) -> dict[str, Tensor]:
    """Return the run's tensors by name; loading writes into them."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"model.{name}": parameter.data for parameter, name in names.items()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"optimizer.{names[parameter]}.{key}"] = value
    return tensors


def _materialise_state(optimizer: Optimizers) -> None:
    """Make a fresh optimiser allocate its state, by a step that changes nothing, so it can be loaded into."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        intact = state.pop("sha256") == _digest(state)
        files = dict(state["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"{path / _STATE} is missing or unreadable ({type(error).__name__})") from error
    if not intact:
        raise SnapshotError(f"{path / _STATE} is altered")
    for name, digest in files.items():
        file = path / name
        if not file.is_file() or sha256_file(file) != digest:
            raise SnapshotError(f"{file} is missing or altered")
    return state


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep quiet about there being one process only: that is not special here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
