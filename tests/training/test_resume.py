"""Nothing is lost: a run that was killed, stopped or cut short continues bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.corpus import Tokenizer, prepare
from outrider.errors import Interrupted, OutriderError, SnapshotError
from outrider.recipe import Recipe
from outrider.training import train
from outrider.training.signals import StopRequest
from outrider.training.snapshots import SnapshotStore
from outrider.training.telemetry import METRICS, read_metrics
from tests.conftest import TEXTS, Cli, assert_one_line_error

STEPS = 48
#: Figures that depend on the clock; everything else in a record must repeat exactly.
TIMED = {"seconds", "tokens_per_second", "mfu"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def timeless(path: Path) -> list[dict[str, Any]]:
    """The records of a log, in order, without what the clock decides."""
    return [{key: value for key, value in record.items() if key not in TIMED}
            for record in read_metrics(path)]


class StopAt:
    """Asks the run politely to stop while it takes step `step`."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, done: float, total: float | None, note: str) -> None:
        if done == self.step:
            signal.raise_signal(signal.SIGTERM)


def silent(line: str) -> None:
    """Take a warning and drop it."""


@dataclass(frozen=True)
class Outcome:
    """What two equal runs must agree on."""

    records: list[dict[str, Any]]
    weights: bytes

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        return cls(timeless(folder / METRICS), (folder / "model" / "model.safetensors").read_bytes())


def overrides(kind: str) -> list[str]:
    return [f"training.tokens={STEPS * 256}", f"optimizer.kind='{kind}'", "evaluation.every=7",
            "evaluation.tokens=200"]


@pytest.fixture
def undisturbed(tmp_path: Path, recipe_file: Path) -> Callable[[str], Outcome]:
    """Train to the end in this process, without any snapshot on the way."""

    def run(kind: str) -> Outcome:
        folder = tmp_path / "undisturbed"
        train(Recipe.load(recipe_file, [*overrides(kind), f"output='{folder}'"]))
        return Outcome.of(folder)

    return run


class Sitting:
    """`outrider train` in a process of its own, that can be watched and struck."""

    def __init__(self, recipe_file: Path, kind: str, every: int, *, resume: bool) -> None:
        self.metrics = recipe_file.parent / "run" / METRICS
        self._before = self._last_step()
        settings = [part for setting in [*overrides(kind), f"snapshots.every={every}"]
                    for part in ("--set", setting)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "outrider", "train", str(recipe_file), *settings, *["--resume"] * resume],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})

    def _last_step(self) -> int:
        records = read_metrics(self.metrics) if self.metrics.is_file() else []
        return max((record["step"] for record in records), default=0)

    def strike(self, number: signal.Signals, after_steps: int, delay: float = 0.0) -> tuple[int, str]:
        """Send a signal once the log has grown by `after_steps`; return the exit code and standard error."""
        while self._last_step() < self._before + after_steps:
            assert self.process.poll() is None, self.process.communicate()[1]
            time.sleep(0.001)
        time.sleep(delay)
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors


@pytest.mark.parametrize(("kind", "every", "kills"), [("adamw", 1, 3), ("muon", 2, 2)])
def test_killing_at_random_moments_changes_nothing(tmp_path: Path, recipe_file: Path, kind: str, every: int,
                                                   kills: int, undisturbed: Callable[[str], Outcome]) -> None:
    chance = random.Random(kind)
    for sitting in range(kills):
        running = Sitting(recipe_file, kind, every, resume=sitting > 0)
        # Any moment: between steps, in the middle of one, or while a snapshot is being written.
        code, errors = running.strike(signal.SIGKILL, chance.randint(2, 6), chance.random() * 0.03)
        assert code == -signal.SIGKILL, errors
        saved = SnapshotStore(tmp_path / "run" / "snapshots").list()
        assert saved, "killed before the first snapshot: nothing would be resumed"
        assert not (tmp_path / "run" / "model").exists(), "it had finished: nothing was killed"
    last = Sitting(recipe_file, kind, every, resume=True)
    _, errors = last.process.communicate(timeout=120)
    assert last.process.returncode == 0, errors
    assert "continuing" in errors
    found, expected = Outcome.of(tmp_path / "run"), undisturbed(kind)
    steps = [record["step"] for record in found.records if "loss" in record]
    assert steps == list(range(1, STEPS + 1))
    scored = [record["step"] for record in found.records if "bits_per_byte" in record]
    assert scored == [*range(7, STEPS, 7), STEPS]
    assert found.records == expected.records
    assert found.weights == expected.weights


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_saves_and_leaves(tmp_path: Path, recipe_file: Path, number: signal.Signals,
                                          code: int, undisturbed: Callable[[str], Outcome]) -> None:
    """No snapshot is due before the end: the one that is there was made because of the signal."""
    found, errors = Sitting(recipe_file, "adamw", 0, resume=False).strike(number, 3)
    assert found == code, errors
    assert "Traceback" not in errors
    assert "--resume" in errors
    stopped_after = read_metrics(tmp_path / "run" / METRICS)[-1]["step"]
    assert [path.name for path in SnapshotStore(tmp_path / "run" / "snapshots").list()] == \
        [f"step-{stopped_after:08d}"]
    assert stopped_after < STEPS
    train(Recipe.load(recipe_file, overrides("adamw")), resume=True, warn=silent)
    assert Outcome.of(tmp_path / "run") == undisturbed("adamw")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("stop_at", [1, 7, 33, STEPS - 1])
def test_stopping_anywhere_changes_nothing(tmp_path: Path, recipe_file: Path, kind: str, stop_at: int,
                                           undisturbed: Callable[[str], Outcome]) -> None:
    """The first and the last step, one that also evaluates (7), one beyond an epoch (33 windows)."""
    recipe = Recipe.load(recipe_file, overrides(kind))
    with pytest.raises(Interrupted) as caught:
        train(recipe, watcher=StopAt(stop_at))
    assert caught.value.signal_number == signal.SIGTERM
    assert f"after step {stop_at};" in str(caught.value)
    # Whatever the process drew meanwhile must not matter: the random state is part of the snapshot.
    torch.manual_seed(stop_at)
    train(recipe, resume=True, warn=silent)
    assert Outcome.of(tmp_path / "run") == undisturbed(kind)


def test_two_threads_change_nothing_either(tmp_path: Path, recipe_file: Path) -> None:
    torch.set_num_threads(2)
    train(Recipe.load(recipe_file, [f"output='{tmp_path / 'undisturbed'}'"]))
    with pytest.raises(Interrupted):
        train(Recipe.load(recipe_file), watcher=StopAt(4))
    train(Recipe.load(recipe_file), resume=True, warn=silent)
    assert Outcome.of(tmp_path / "run") == Outcome.of(tmp_path / "undisturbed")


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path: Path, recipe_file: Path) -> None:
    result = train(Recipe.load(recipe_file), watcher=StopAt(10))
    assert result.steps == 10
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_handlers_are_restored_and_a_second_ctrl_c_ends_at_once() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        assert stop.signal_number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert {number: signal.getsignal(number) for number in before} == before


def test_resume_without_a_snapshot_starts(tmp_path: Path, recipe_file: Path,
                                          undisturbed: Callable[[str], Outcome]) -> None:
    """Also after a run that died before its first snapshot, whose log is begun again."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / METRICS).write_text('{"step": 1, "loss": 99.0}\n{"step": 2, "lo')
    train(Recipe.load(recipe_file, overrides("adamw")), resume=True)
    assert Outcome.of(folder) == undisturbed("adamw")


def test_resuming_a_finished_run_repeats_its_result(tmp_path: Path, recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file, overrides("adamw"))
    first = train(recipe)
    before = Outcome.of(tmp_path / "run")
    again = train(recipe, resume=True, warn=silent)
    assert again.steps == first.steps
    assert again.tokens == first.tokens
    assert again.validation == first.validation
    assert again.loss == first.loss
    assert Outcome.of(tmp_path / "run") == before


def test_a_run_killed_while_writing_its_model_can_be_finished(tmp_path: Path, recipe_file: Path,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              undisturbed: Callable[[str], Outcome]) -> None:
    def killed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    recipe = Recipe.load(recipe_file, overrides("adamw"))
    with monkeypatch.context() as patch:
        patch.setattr("outrider.training.loop.save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    train(recipe, resume=True, warn=silent)
    assert Outcome.of(tmp_path / "run") == undisturbed("adamw")


def test_an_existing_run_needs_resume_or_force(tmp_path: Path, recipe_file: Path, cli: Cli) -> None:
    train(Recipe.load(recipe_file))
    before = Outcome.of(tmp_path / "run")
    assert_one_line_error(cli("train", recipe_file), "--resume", "--force", str(tmp_path / "run"))
    assert Outcome.of(tmp_path / "run") == before


#: Another legal value for every key that decides what is computed.
COMPUTED = {
    "name": '"other"', "model.hidden_size": "64", "model.num_hidden_layers": "1", "model.vocab_size": "400",
    "model.rope_theta": "20000.0", "training.tokens": "5120", "training.batch_tokens": "512",
    "training.context": "32", "training.micro_batch": "2", "training.precision": '"bf16"',
    "training.clip": "0.5", "training.seed": "3", "optimizer.kind": '"muon"', "optimizer.lr": "2e-3",
    "optimizer.betas": "[0.8, 0.95]", "optimizer.eps": "1e-7", "optimizer.weight_decay": "0.2",
    "schedule.kind": '"wsd"', "schedule.warmup": "3", "schedule.final": "0.2", "schedule.decay": "0.3",
    "distillation.share": "0.5",
}
#: And for those that do not.
FREE = {"evaluation.every": "2", "evaluation.tokens": "100", "snapshots.every": "4", "snapshots.keep": "1"}


def test_the_lists_above_are_complete(recipe_file: Path) -> None:
    """A key added to the recipe must be decided upon here."""
    dumped = Recipe.load(recipe_file).dump()
    keys = {f"{section}.{key}" if isinstance(values, dict) else section
            for section, values in dumped.items() if section != "model"
            for key in (values if isinstance(values, dict) else [""])}
    elsewhere = {"output", "data.path", "distillation.teacher", "logging.tensorboard"}
    undecided = {"training.device", "training.threads", "training.compile"}
    listed = {key for key in COMPUTED | FREE if not key.startswith("model.")}
    assert keys - elsewhere - undecided == listed


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The folder of a run stopped after four steps of ten; do not change it."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "recipe.toml").write_text(f"""
name = "tiny"
output = {json.dumps(str(folder / "run"))}
model = {{hidden_size = 32, intermediate_size = 48, num_hidden_layers = 2, num_attention_heads = 4}}
data = {{path = {json.dumps(str(corpus))}}}
training = {{tokens = 2560, batch_tokens = 256, context = 64, precision = "fp32"}}
optimizer = {{lr = 1e-3}}
""")

    with pytest.raises(Interrupted):
        train(Recipe.load(folder / "recipe.toml"), watcher=StopAt(4))
    return folder


@pytest.mark.parametrize("key", COMPUTED)
def test_a_changed_recipe_is_refused_by_name(half_done: Path, key: str) -> None:
    run = half_done / "run"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    recipe = Recipe.load(half_done / "recipe.toml", [f"{key}={COMPUTED[key]}"])
    with pytest.raises(OutriderError) as caught:
        train(recipe, resume=True, warn=silent)
    assert key in str(caught.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", FREE)
def test_evaluation_and_snapshots_may_change(tmp_path: Path, recipe_file: Path, key: str) -> None:
    plain = train(Recipe.load(recipe_file, ["snapshots.every=5", f"output='{tmp_path / 'plain'}'"]))

    with pytest.raises(Interrupted):
        train(Recipe.load(recipe_file), watcher=StopAt(4))
    result = train(Recipe.load(recipe_file, [f"{key}={FREE[key]}"]), resume=True, warn=silent)
    found, expected = ((folder / "model.safetensors").read_bytes() for folder in (result.model, plain.model))
    assert found == expected


def test_a_run_may_be_moved(tmp_path: Path, recipe_file: Path, undisturbed: Callable[[str], Outcome]) -> None:
    with pytest.raises(Interrupted):
        train(Recipe.load(recipe_file, overrides("adamw")), watcher=StopAt(4))
    (tmp_path / "run").rename(tmp_path / "moved")
    recipe = Recipe.load(recipe_file, [*overrides("adamw"), f"output='{tmp_path / 'moved'}'"])
    train(recipe, resume=True, warn=silent)
    assert Outcome.of(tmp_path / "moved") == undisturbed("adamw")


def test_a_changed_corpus_is_refused(tmp_path: Path, recipe_file: Path, tokenizer: Tokenizer) -> None:
    source, corpus = tmp_path / "text.txt", tmp_path / "corpus"
    source.write_text("\n".join(TEXTS))
    prepare([str(source)], corpus, tokenizer=tokenizer, validation=0)
    recipe = Recipe.load(recipe_file, [f"data.path='{corpus}'", "snapshots.every=5"])
    train(recipe)
    before = Outcome.of(tmp_path / "run")
    source.write_text("\n".join(reversed(TEXTS)))  # as long, and other text
    prepare([str(source)], corpus, tokenizer=tokenizer, validation=0, replace=True)
    with pytest.raises(SnapshotError, match=r"corpus .* changed"):
        train(recipe, resume=True, warn=silent)
    assert Outcome.of(tmp_path / "run") == before


def test_a_damaged_newest_snapshot_is_passed_over_and_the_steps_are_made_again(
        tmp_path: Path, recipe_file: Path, undisturbed: Callable[[str], Outcome]) -> None:
    recipe = Recipe.load(recipe_file, [*overrides("adamw"), "snapshots.every=20"])

    with pytest.raises(Interrupted):
        train(recipe, watcher=StopAt(41))
    newest = tmp_path / "run" / "snapshots" / "step-00000041"
    tensors = next(newest.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    said: list[str] = []
    train(recipe, resume=True, warn=said.append)
    assert any("passing over" in line and newest.name in line for line in said)
    assert any("after step 40" in line for line in said)
    assert Outcome.of(tmp_path / "run") == undisturbed("adamw")
