"""Snapshots are whole or absent, restore everything, and a damaged one is never taken for a good one."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from outrider.corpus.batches import Position
from outrider.errors import DiskError, SnapshotError
from outrider.model import Llama
from outrider.recipe import OptimizerSection, Recipe
from outrider.training import train
from outrider.training.optimizers import Optimizers, build_optimizer
from outrider.training.snapshots import Progress, SnapshotStore, restore
from tests.conftest import tiny_model

CPU = torch.device("cpu")
RECIPE = {"name": "tiny", "training": {"tokens": 2560}}


def parts(seed: int = 0, steps: int = 0, kind: str = "adamw", **shape: Any) -> tuple[Llama, Optimizers]:
    """A model and its optimiser after some steps on random gradients."""
    model = tiny_model(seed, **shape).requires_grad_(True)
    optimizer = build_optimizer(model, OptimizerSection(kind=kind), CPU)  # type: ignore[arg-type]
    for step in range(steps):
        push(model, optimizer, seed + step)
    return model, optimizer


def push(model: Llama, optimizer: Optimizers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    optimizer.zero_grad()


def tensors(model: Llama, optimizer: Optimizers) -> dict[str, Tensor]:
    """Everything that must come back, by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        found |= {f"{name}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def save(store: SnapshotStore, step: int, *args: Any) -> Path:
    model, optimizer = args or parts(steps=1)
    progress = Progress(step, 100 * step, Position(1, step), 0.5 * step)
    return store.save(model, optimizer, progress, RECIPE, "corpus")


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path / "snapshots", keep=2)


def silent(line: str) -> None:
    """Take a warning and drop it."""


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_everything_comes_back(store: SnapshotStore, kind: str, tied: bool) -> None:
    saved = parts(1, 3, kind, tie_word_embeddings=tied)
    torch.manual_seed(42)
    save(store, 3, *saved)
    next_draws = torch.rand(5)
    fresh = parts(9, 0, kind, tie_word_embeddings=tied)
    torch.manual_seed(7)
    found = store.newest(pytest.fail)
    assert found is not None
    path, state = found
    assert state["recipe"] == RECIPE
    assert state["corpus_sha256"] == "corpus"
    progress = restore(path, state, *fresh)
    assert (progress.step, progress.tokens, progress.seconds) == (3, 300, 1.5)
    assert progress.position == Position(1, 3)
    assert torch.equal(torch.rand(5), next_draws)
    expected, got = tensors(*saved), tensors(*fresh)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    # And both go on alike.
    for model, optimizer in (saved, fresh):
        push(model, optimizer, 77)
    assert all(torch.equal(a, b) for a, b in zip(saved[0].parameters(), fresh[0].parameters(), strict=True))
    assert not tied or fresh[0].head.weight is fresh[0].embedding.weight


@pytest.mark.parametrize("other", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"kind": "muon"}])
def test_a_snapshot_of_another_model_is_refused(store: SnapshotStore, other: dict[str, Any]) -> None:
    save(store, 1)
    found = store.newest(silent)
    assert found is not None
    with pytest.raises(SnapshotError, match="does not fit") as caught:
        restore(*found, *parts(**other))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_last_n_are_kept(tmp_path: Path, keep: int) -> None:
    store = SnapshotStore(tmp_path, keep=keep)
    trained = parts(steps=1)
    for step in range(1, 6):
        save(store, step, *trained)
        kept = [f"step-{n:08d}" for n in range(max(1, step - keep + 1), step + 1)]
        assert sorted(path.name for path in tmp_path.iterdir()) == kept
        assert [path.name for path in store.list()] == kept


def test_the_one_just_written_is_never_the_one_removed(tmp_path: Path) -> None:
    """After a damaged newest was passed over, the run is at an earlier step than that one's name says."""
    trained = parts(steps=1)
    for step in (4, 6):
        save(SnapshotStore(tmp_path, keep=2), step, *trained)
    damage_cut(tmp_path / "step-00000006")
    store = SnapshotStore(tmp_path, keep=1)  # may change when a run is continued
    assert save(store, 5, *trained).is_dir()
    found = store.newest(silent)
    assert found is not None
    assert found[1]["progress"]["step"] == 5


def test_saving_a_step_again_replaces_it(store: SnapshotStore) -> None:
    save(store, 1, *parts(1, 1))
    second = parts(2, 2)
    save(store, 1, *second)
    found = store.newest(pytest.fail)
    assert found is not None
    fresh = parts(3)
    restore(*found, *fresh)
    assert torch.equal(fresh[0].head.weight, second[0].head.weight)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]


def test_no_pickle_anywhere(tmp_path: Path, recipe_file: Path) -> None:
    train(Recipe.load(recipe_file, ["snapshots.every=5", "optimizer.kind='muon'"]))
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as opened:
                assert list(opened.keys())
        else:
            text = path.read_text(encoding="utf-8")
            for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
                json.loads(part)


def test_nothing_there_is_no_snapshot(store: SnapshotStore) -> None:
    assert store.list() == []
    assert store.newest(pytest.fail) is None


def test_unfinished_and_foreign_folders_are_not_snapshots(store: SnapshotStore) -> None:
    save(store, 5)
    for name in (".step-00000006.x.partial", ".step-00000004.x.old", "step-7", "step-00000008.bak", "notes"):
        (store.folder / name).mkdir()
    (store.folder / "step-00000009").write_text("a file")
    assert [path.name for path in store.list()] == ["step-00000005"]


# --- failing in the middle ---------------------------------------------------------------------------------

def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


TENSORS = "torch.distributed.checkpoint.filesystem.FileSystem.create_stream"


@pytest.mark.parametrize(("place", "failure", "error"), [
    pytest.param(TENSORS, full_disk, DiskError, id="tensors"),
    pytest.param("outrider.files.os.fsync", full_disk, DiskError, id="flush"),
    pytest.param("outrider.training.snapshots.write_json", full_disk, DiskError, id="state"),
    pytest.param("outrider.files._take_name", full_disk, DiskError, id="rename"),
    pytest.param("outrider.training.snapshots.write_json", interrupt, KeyboardInterrupt, id="interrupted"),
    pytest.param("outrider.files._sync_tree", interrupt, KeyboardInterrupt, id="interrupted flushing"),
])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(
        store: SnapshotStore, monkeypatch: pytest.MonkeyPatch, place: str, failure: Callable[..., None],
        error: type[BaseException]) -> None:
    trained = parts(steps=1)
    for step in (1, 2):
        save(store, step, *trained)
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(place, failure)
    for step in (2, 3):  # replacing one, and making a new one
        with pytest.raises(error) as caught:
            save(store, step, *trained)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before
        assert sorted(path.name for path in store.folder.iterdir()) == ["step-00000001", "step-00000002"]
    monkeypatch.undo()
    assert save(store, 3, *trained).is_dir()


def test_files_are_flushed_before_the_name_is_taken(store: SnapshotStore,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Renamed first and flushed later, a snapshot could be empty after a power cut."""
    import outrider.files as files
    events: list[str] = []
    sync, take = files._sync, files._take_name
    monkeypatch.setattr(files, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(files, "_take_name", lambda *paths: (events.append("rename"), take(*paths)))
    path = save(store, 1)
    flushed = events[:events.index("rename")]
    assert {file.name for file in path.iterdir()} <= set(flushed)
    assert events.index("rename") == len(flushed)
    assert "snapshots" in events[len(flushed):], "the folder that holds the new name is flushed too"


# --- damage ------------------------------------------------------------------------------------------------

def tensor_file(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def damage_cut(path: Path) -> None:
    file = tensor_file(path)
    file.write_bytes(file.read_bytes()[:-1])


def damage_half(path: Path) -> None:
    file = tensor_file(path)
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def damage_empty(path: Path) -> None:
    tensor_file(path).write_bytes(b"")


def damage_missing(path: Path) -> None:
    tensor_file(path).unlink()


def damage_longer(path: Path) -> None:
    file = tensor_file(path)
    file.write_bytes(file.read_bytes() + b"\0")


def damage_other_folder(path: Path) -> None:
    file = tensor_file(path)
    file.unlink()
    file.mkdir()


def state_missing(path: Path) -> None:
    (path / "state.json").unlink()


def state_with(text: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        (path / "state.json").write_text(text)

    return damage


def state_without(*keys: str) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        state = json.loads((path / "state.json").read_text())
        table = state
        for key in keys[:-1]:
            table = table[key]
        del table[keys[-1]]
        (path / "state.json").write_text(json.dumps(state))

    return damage


def state_binary(path: Path) -> None:
    (path / "state.json").write_bytes(b"\xff\xfe\x00")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut by a byte": damage_cut, "cut by half": damage_half, "emptied": damage_empty,
    "missing": damage_missing, "longer": damage_longer, "a folder in its place": damage_other_folder,
    "no state": state_missing, "empty state": state_with(""),
    "cut state": state_with('{"format": "outrider-snap'), "state a list": state_with("[]"),
    "state a number": state_with("3"), "state empty": state_with("{}"), "state not text": state_binary,
    **{f"state lacks {'.'.join(keys)}": state_without(*keys) for keys in (
        ("files",), ("recipe",), ("corpus_sha256",), ("progress",), ("progress", "step"),
        ("progress", "tokens"), ("progress", "position"), ("progress", "position", "window"),
        ("progress", "seconds"))},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_is_passed_over(store: SnapshotStore, name: str) -> None:
    trained = parts(steps=1)
    for step in (1, 2):
        save(store, step, *trained)
    DAMAGES[name](store.folder / "step-00000002")
    said: list[str] = []
    found = store.newest(said.append)
    assert found is not None
    assert found[0].name == "step-00000001"
    assert len(said) == 1
    assert "step-00000002" in said[0]
    assert "\n" not in said[0]
    assert restore(*found, *parts()).step == 1
    assert (store.folder / "step-00000002").is_dir(), "left for the person to look at"


def test_a_flipped_bit_anywhere_in_the_tensors_is_noticed(store: SnapshotStore) -> None:
    save(store, 1)
    file = tensor_file(store.folder / "step-00000001")
    good = file.read_bytes()
    # The header's length, its text, and places all over the data, to the last byte.
    for place in [*range(9), 500, *range(2_000, len(good), len(good) // 30), len(good) - 1]:
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        with pytest.raises(SnapshotError, match="damaged"):
            store.newest(silent)
    file.write_bytes(good)
    assert store.newest(pytest.fail) is not None


def test_a_flipped_bit_anywhere_in_the_state_is_noticed_or_harmless(store: SnapshotStore) -> None:
    """A step, a position or a hash that reads well and is wrong would continue another run than was saved."""
    save(store, 1)
    file = store.folder / "step-00000001" / "state.json"
    good = file.read_bytes()

    def read() -> tuple[Any, ...]:
        found = store.newest(silent)
        assert found is not None
        return tuple(found[1].get(key) for key in ("progress", "recipe", "corpus_sha256"))

    expected = read()
    unnoticed = []
    for place in range(len(good)):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        try:
            found = read()
        except SnapshotError:
            continue
        if found != expected:
            unnoticed.append(good[max(0, place - 12):place + 4].decode())
    assert not unnoticed


def test_all_damaged_is_an_error_that_touches_nothing(store: SnapshotStore) -> None:
    trained = parts(steps=1)
    for step in (1, 2):
        damage_half(save(store, step, *trained))
    before = {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()}
    said: list[str] = []
    with pytest.raises(SnapshotError, match=r"all 2 snapshots .*--force"):
        store.newest(said.append)
    assert len(said) == 2
    assert {path: path.read_bytes() for path in store.folder.rglob("*") if path.is_file()} == before


def test_a_snapshot_made_without_a_gpu_can_be_continued_beside_one(store: SnapshotStore,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """One recipe from a laptop to a cluster: a CPU run is moved to a machine that also has a GPU."""
    save(store, 1)
    found = store.newest(pytest.fail)
    assert found is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *a: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *a: None)
    assert restore(*found, *parts()).step == 1
