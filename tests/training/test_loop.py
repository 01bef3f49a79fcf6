"""The training loop against independent references: transformers, torch's own AdamW, and arithmetic."""

from __future__ import annotations

import errno
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from outrider.corpus import IGNORED, TokenCorpus, Tokenizer, prepare
from outrider.errors import ConfigError, DiskError, NonFiniteLossError, SnapshotError
from outrider.evaluation import evaluate_corpus
from outrider.model import load_model, save_model
from outrider.recipe import Recipe
from outrider.training import train
from outrider.training.objectives import distillation, next_token
from outrider.training.snapshots import SnapshotStore
from outrider.training.telemetry import METRICS, read_metrics
from tests.conftest import TEXTS, Cli, assert_one_line_error, tiny_model

WINDOWS = 33  # of 64 tokens in the tiny corpus; checked below, as the tests of a whole epoch lean on it


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose a lot on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def steps_of(path: Path) -> list[dict]:
    """The records of training steps."""
    return [record for record in read_metrics(path) if "loss" in record]


def losses(path: Path) -> list[float]:
    return [record["loss"] for record in steps_of(path)]


def silent(line: str) -> None:
    """Take a warning and drop it."""


class Recorder:
    """The next-token objective, keeping what it was given. `fail_at`: calls whose loss is spoilt, from 1."""

    def __init__(self, fail_at: tuple[int, ...] = (), how: str = "nan") -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.model: nn.Module | None = None
        self.fail_at, self.how = fail_at, how

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        self.model = model
        self.batches.append((inputs.clone(), targets.clone()))
        loss = next_token(model, inputs, targets)
        if len(self.batches) in self.fail_at:
            if self.how == "gradient":
                # The root of zero is finite and its derivative is not.
                return loss + torch.sqrt(0.0 * next(model.parameters()).square().sum())
            return loss * float(self.how)
        return loss


@pytest.mark.parametrize("vocabulary", [300, 1_000, 8_192])
def test_a_fresh_model_knows_nothing(recipe_file: Path, vocabulary: int) -> None:
    """Before learning, every token is about equally likely: the loss is ln(vocabulary)."""
    recipe = Recipe.load(recipe_file, [f"model.vocab_size={vocabulary}", "training.tokens=256"])
    assert losses(train(recipe).metrics)[0] == pytest.approx(math.log(vocabulary), abs=0.1)


def test_loss_falls(recipe_file: Path) -> None:
    result = train(Recipe.load(recipe_file, ["training.tokens=10240", "optimizer.lr=1e-2"]))
    seen = losses(result.metrics)
    assert sum(seen[-5:]) / 5 < seen[0] - 1.5
    assert result.loss == seen[-1]
    assert result.validation is not None
    assert result.validation.loss < seen[0] - 1.5


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_one_batch_can_be_learnt_by_heart(tmp_path: Path, recipe_file: Path, tokenizer: Tokenizer,
                                          kind: str) -> None:
    """A loop with any of its parts miswired (targets, mask, gradient, optimiser) does not get there."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(str(pow(3, n, 10_007)) for n in range(1, 20)))
    manifest = prepare([str(text)], tmp_path / "one", tokenizer=tokenizer, validation=0)
    assert 32 < manifest.splits["train"].tokens <= 129
    recipe = Recipe.load(recipe_file, [
        f"data.path='{tmp_path / 'one'}'", "training.context=128", "training.batch_tokens=128",
        "training.tokens=19200", f"optimizer.kind='{kind}'", "optimizer.lr=1e-2"])
    assert train(recipe).loss < 0.1


def test_any_micro_batch_gives_the_same_training(tmp_path: Path, recipe_file: Path) -> None:
    """Losses are divided by the global token count, so also uneven parts and the padded tail agree."""
    runs = {}
    for micro in (0, 1, 2, 3, 4):
        folder = tmp_path / str(micro)
        result = train(Recipe.load(recipe_file, [f"training.micro_batch={micro}", f"output='{folder}'"]))
        runs[micro] = losses(result.metrics), dict(load_model(result.model).named_parameters())
    expected, weights = runs.pop(0)
    assert len(expected) == 10
    for micro, (found, found_weights) in runs.items():
        assert found == pytest.approx(expected, rel=1e-6), micro
        for name, weight in weights.items():
            difference = (found_weights[name] - weight).norm() / weight.norm()
            assert difference < 1e-6, (micro, name, difference)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_steps_equal_a_loop_written_with_transformers(recipe_file: Path, model_folder: Path,
                                                      clip: float) -> None:
    """Ten steps from the same weights on the same batches, with another model, optimiser and schedule."""
    objective = Recorder()
    recipe = Recipe.load(recipe_file, [f"model={{start_from='{model_folder}'}}", f"training.clip={clip}"])
    result = train(recipe, objective=objective)
    reference = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW([
        {"params": [p for p in reference.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    assert len(objective.batches) == 10
    for step, (inputs, targets) in enumerate(objective.batches):
        # Two steps of warm-up, then a cosine to a tenth over the other eight.
        cosine = (1 + math.cos(math.pi * (step - 1) / 8)) / 2
        rate = 1e-3 * ((step + 1) / 2 if step < 2 else 0.1 + 0.9 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = reference(input_ids=inputs).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        record = steps_of(result.metrics)[step]
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5), step
        assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4), step
        assert record["learning_rate"] == pytest.approx(rate, rel=1e-12), step
    trained = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    for (name, expected), found in zip(reference.named_parameters(), trained.parameters(), strict=True):
        assert (found - expected).norm() < 1e-4 * expected.norm(), name


def test_the_tiny_corpus_has_a_tail(corpus: Path) -> None:
    tokens = len(TokenCorpus(corpus)) - 1
    assert -(-tokens // 64) == WINDOWS
    assert tokens % 64, "without a shorter last window, the tests of the tail test nothing"


def test_an_epoch_counts_every_token_once(corpus: Path, recipe_file: Path) -> None:
    """Eleven batches of three windows are the 33 windows of the corpus, the short tail among them."""
    objective = Recorder()
    recipe = Recipe.load(recipe_file, ["training.batch_tokens=192", f"training.tokens={WINDOWS * 64}"])
    result = train(recipe, objective=objective)
    text = TokenCorpus(corpus)
    tokens = text.read(0, len(text)).tolist()
    expected = Counter(tuple(zip(tokens[first:first + 64], tokens[first + 1:first + 65], strict=False))
                       for first in range(0, len(tokens) - 1, 64))
    seen: Counter[tuple] = Counter()
    for inputs, targets in objective.batches:
        for row_in, row_out in zip(inputs.tolist(), targets.tolist(), strict=True):
            seen[tuple((i, t) for i, t in zip(row_in, row_out, strict=True) if t != IGNORED)] += 1
    assert seen == expected
    assert result.tokens == len(tokens) - 1
    last = steps_of(result.metrics)[-1]
    assert (last["tokens"], last["epoch"], last["window"]) == (len(tokens) - 1, 1, 0)


def test_a_batch_across_the_end_of_an_epoch_is_full(recipe_file: Path) -> None:
    """33 windows in batches of four: the ninth batch takes one from this epoch and three from the next."""
    objective = Recorder()
    train(Recipe.load(recipe_file), objective=objective)
    assert [len(inputs) for inputs, _ in objective.batches] == [4] * 10


def test_a_seed_makes_runs_identical(tmp_path: Path, recipe_file: Path) -> None:
    def run(name: str, seed: int) -> tuple[list[float], bytes]:
        result = train(Recipe.load(recipe_file, [f"training.seed={seed}", f"output='{tmp_path / name}'"]))
        return losses(result.metrics), (result.model / "model.safetensors").read_bytes()

    first, again, other = run("a", 5), run("b", 5), run("c", 6)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_bf16_follows_fp32(tmp_path: Path, recipe_file: Path) -> None:
    full, half = (losses(train(Recipe.load(recipe_file, [
        f"training.precision='{precision}'", f"output='{tmp_path / precision}'"])).metrics)
        for precision in ("fp32", "bf16"))
    assert half == pytest.approx(full, abs=0.02)
    assert half != full  # or the setting does nothing


def test_fine_tuning_starts_at_the_models_own_loss(recipe_file: Path, model_folder: Path,
                                                   corpus: Path) -> None:
    """One step over the whole corpus: its loss is the folder's, scored by the other package."""
    batch = WINDOWS * 64
    recipe = Recipe.load(recipe_file, [f"model={{start_from='{model_folder}'}}",
                                       f"training.batch_tokens={batch}", f"training.tokens={batch}"])
    before = {path.name: path.read_bytes() for path in model_folder.iterdir()}
    loss = losses(train(recipe).metrics)[0]
    expected = evaluate_corpus(model_folder, corpus, split="train", context=64).loss
    assert loss == pytest.approx(expected, rel=1e-6)
    assert {path.name: path.read_bytes() for path in model_folder.iterdir()} == before


def test_fine_tuning_refuses_another_tokenizer(tmp_path: Path, recipe_file: Path, model_folder: Path) -> None:
    other = Tokenizer.train_bpe([text.upper() for text in TEXTS], 300)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    prepare([str(text)], tmp_path / "other", tokenizer=other, validation=0)
    recipe = Recipe.load(recipe_file, [f"model={{start_from='{model_folder}'}}",
                                       f"data.path='{tmp_path / 'other'}'"])
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["nan", "inf", "-inf", "gradient"])
def test_a_non_finite_step_stops_and_keeps_the_last_snapshot(tmp_path: Path, recipe_file: Path,
                                                             how: str) -> None:
    """The spoilt step leaves no trace: continuing without it gives the undisturbed result, bit for bit."""
    recipe = Recipe.load(recipe_file, ["snapshots.every=2"])
    with pytest.raises(NonFiniteLossError) as caught:
        train(recipe, objective=Recorder((6,), how))
    message = str(caught.value)
    assert "step 6" in message
    assert "step-00000004" in message
    assert ("gradient" in message.split(" became ")[0]) == (how == "gradient")
    assert "\n" not in message
    store = SnapshotStore(tmp_path / "run" / "snapshots")
    assert [path.name for path in store.list()] == ["step-00000002", "step-00000004"]
    # Every line is JSON that any reader takes: Python alone writes NaN.
    lines = (tmp_path / "run" / METRICS).read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines] == [1, 2, 3, 4, 5]
    continued = train(recipe, resume=True, warn=silent)
    undisturbed = train(Recipe.load(recipe_file, [f"output='{tmp_path / 'undisturbed'}'"]))
    assert losses(continued.metrics) == losses(undisturbed.metrics)
    assert (continued.model / "model.safetensors").read_bytes() == \
        (undisturbed.model / "model.safetensors").read_bytes()


def test_one_spoilt_micro_batch_is_enough(recipe_file: Path) -> None:
    recipe = Recipe.load(recipe_file, ["training.micro_batch=1"])
    with pytest.raises(NonFiniteLossError, match=r"step 2.*no snapshot"):
        train(recipe, objective=Recorder((7,)))  # four micro-batches a step: the third of step 2


def test_overflowing_weights_are_one_line_for_the_user(recipe_file: Path, cli: Cli) -> None:
    result = cli("train", recipe_file, "--set", "model.initializer_range=1e30")
    assert_one_line_error(result, "step 1", "no snapshot")


def test_the_model_folder_opens_in_transformers_with_the_same_logits(recipe_file: Path,
                                                                     tokenizer: Tokenizer) -> None:
    objective = Recorder()
    result = train(Recipe.load(recipe_file), objective=objective)
    ids = torch.tensor([tokenizer.encode(TEXTS[3])[:100]])
    reopened = AutoModelForCausalLM.from_pretrained(result.model, dtype=torch.float32)
    assert objective.model is not None
    with torch.no_grad():
        expected = objective.model(ids)
        torch.testing.assert_close(reopened(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(load_model(result.model)(ids), expected, rtol=0, atol=0)
    assert Tokenizer.load(result.model).sha256 == tokenizer.sha256
    assert reopened.config.bos_token_id == tokenizer.bos_id
    assert reopened.config.eos_token_id == tokenizer.eos_id


def test_bits_per_byte_is_what_evaluation_says(recipe_file: Path, corpus: Path) -> None:
    result = train(Recipe.load(recipe_file, ["evaluation.every=4"]))
    scores = evaluate_corpus(result.model, corpus, context=64)
    assert result.validation is not None
    assert result.validation.bits_per_byte == pytest.approx(scores.bits_per_byte, rel=1e-6)
    assert result.validation.tokens == scores.tokens == len(TokenCorpus(corpus, "validation")) - 1
    # By hand: the code length of the whole split over the bytes of its text.
    bits = scores.loss * scores.tokens / math.log(2)
    text = TokenCorpus(corpus, "validation").totals.bytes
    assert scores.bits_per_byte == pytest.approx(bits / text, rel=1e-9)
    on_the_way = [record for record in read_metrics(result.metrics) if "bits_per_byte" in record]
    assert [record["step"] for record in on_the_way] == [4, 8, 10]
    assert on_the_way[-1]["bits_per_byte"] == result.validation.bits_per_byte


def test_evaluating_does_not_touch_the_training(tmp_path: Path, recipe_file: Path) -> None:
    with_it = train(Recipe.load(recipe_file, ["evaluation.every=1"]))
    without = train(Recipe.load(recipe_file, [f"output='{tmp_path / 'without'}'"]))
    assert losses(with_it.metrics) == losses(without.metrics)


def test_a_corpus_without_validation_will_do(tmp_path: Path, recipe_file: Path, text_folder: Path,
                                             tokenizer: Tokenizer) -> None:
    prepare([str(text_folder)], tmp_path / "all", tokenizer=tokenizer, validation=0)
    result = train(Recipe.load(recipe_file, [f"data.path='{tmp_path / 'all'}'", "evaluation.every=2"]))
    assert result.validation is None
    assert len(read_metrics(result.metrics)) == 10


def test_distillation_is_the_cross_entropy_against_the_teachers_law() -> None:
    """Against torch's cross-entropy with soft targets; padded places do not count."""
    teacher, student = tiny_model(1), tiny_model(2)
    ids = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[2, 10:] = IGNORED
    counted = targets.flatten() != IGNORED
    logits = student(inputs).flatten(0, 1)[counted]
    soft = F.cross_entropy(logits, teacher(inputs).flatten(0, 1)[counted].softmax(-1), reduction="sum")
    hard = F.cross_entropy(logits, targets.flatten()[counted], reduction="sum")
    assert abs(soft - hard) > 1  # or the shares below tell nothing
    for share in (1.0, 0.5, 0.1):
        found = distillation(teacher, share)(student, inputs, targets)
        torch.testing.assert_close(found, share * soft + (1 - share) * hard, rtol=1e-5, atol=1e-3)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    """At equality the loss is the teacher's entropy, a minimum; the teacher itself is never changed."""
    teacher, student = tiny_model(1), tiny_model(1).requires_grad_(True)
    ids = torch.arange(60).view(2, 30)
    loss = distillation(teacher)(student, ids, ids)
    loss.backward()
    law = teacher(ids).softmax(-1)
    torch.testing.assert_close(loss.detach(), -(law * law.log()).sum(), rtol=1e-5, atol=1e-4)
    assert all(p.grad is not None and p.grad.abs().max() < 1e-3 for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_distilling_brings_the_draft_closer_to_its_target(recipe_file: Path, model_folder: Path,
                                                          tokenizer: Tokenizer) -> None:
    """The random target knows nothing of the text, so only its own law can lead the draft to it."""
    ids = torch.tensor([tokenizer.encode(text)[:60] for text in TEXTS[:4]])
    law = load_model(model_folder)(ids).softmax(-1)

    def distance(folder: Path) -> float:
        return F.kl_div(load_model(folder)(ids).log_softmax(-1), law, reduction="none").sum(-1).mean().item()

    shorter = ["training.tokens=256", "optimizer.lr=1e-9", f"output='{recipe_file.parent / 'untrained'}'"]
    untrained = train(Recipe.load(recipe_file, shorter))
    recipe = Recipe.load(recipe_file, [f"distillation.teacher='{model_folder}'", "training.tokens=25600",
                                       "optimizer.lr=1e-2"])
    trained = train(recipe)
    assert distance(trained.model) < 0.7 * distance(untrained.model)


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path, recipe_file: Path, corpus: Path) -> None:
    other = Tokenizer.train_bpe([text.upper() for text in TEXTS], 300)
    folder = tmp_path / "teacher"
    save_model(tiny_model(1), folder, tokenizer_from=corpus)
    other.save(folder)
    with pytest.raises(ConfigError, match="another tokenizer"):
        train(Recipe.load(recipe_file, [f"distillation.teacher='{folder}'"]))
    assert not (tmp_path / "run").exists()


def test_the_watcher_hears_of_every_step(recipe_file: Path) -> None:
    class Watcher:
        def __init__(self) -> None:
            self.heard: list[tuple[float, float | None]] = []

        def update(self, done: float, total: float | None, note: str) -> None:
            assert "loss" in note
            assert "tokens/s" in note
            self.heard.append((done, total))

    watcher = Watcher()
    train(Recipe.load(recipe_file), watcher=watcher)
    assert watcher.heard == [(step, 10) for step in range(1, 11)]


def test_an_existing_run_is_replaced_only_when_asked(tmp_path: Path, recipe_file: Path) -> None:
    first = train(Recipe.load(recipe_file))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"--resume.*--force"):
        train(Recipe.load(recipe_file))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    second = train(Recipe.load(recipe_file, ["training.seed=1", "training.tokens=1024"]), replace=True)
    assert second.model == first.model
    assert len(losses(second.metrics)) == 4
    assert [path.name for path in SnapshotStore(tmp_path / "run" / "snapshots").list()] == ["step-00000004"]


def test_a_full_disk_at_a_snapshot_keeps_the_earlier_ones(tmp_path: Path, recipe_file: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch meets it: the write of the second snapshot's tensors fails."""
    from torch.distributed.checkpoint.filesystem import FileSystem
    create, calls = FileSystem.create_stream, 0

    def create_stream(self, path, mode):
        nonlocal calls
        calls += str(path).endswith(".safetensors")
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return create(self, path, mode)

    monkeypatch.setattr(FileSystem, "create_stream", create_stream)
    with pytest.raises(DiskError, match="the disk is full"):
        train(Recipe.load(recipe_file, ["snapshots.every=3"]))
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert train(Recipe.load(recipe_file), resume=True, warn=silent).steps == 10


def test_a_full_disk_at_the_end_keeps_the_last_snapshot(tmp_path: Path, recipe_file: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors reports a full disk in an exception of its own."""

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("outrider.model.folder.save_file", full)
    with pytest.raises(DiskError, match="the disk is full"):
        train(Recipe.load(recipe_file))
    assert not (tmp_path / "run" / "model").exists()
    assert [path.name for path in SnapshotStore(tmp_path / "run" / "snapshots").list()] == ["step-00000010"]


def test_a_run_without_its_corpus_is_refused(tmp_path: Path, recipe_file: Path, cli: Cli) -> None:
    result = cli("train", recipe_file, "--set", "data.path=nowhere")
    assert_one_line_error(result, "nowhere", "outrider data prepare")
    assert not (tmp_path / "run").exists()


def test_damaged_snapshots_are_never_silently_replaced(tmp_path: Path, recipe_file: Path) -> None:
    train(Recipe.load(recipe_file, ["snapshots.every=5"]))
    snapshots = SnapshotStore(tmp_path / "run" / "snapshots").list()
    for path in snapshots:
        next(path.glob("*.safetensors")).write_bytes(b"")
    metrics = (tmp_path / "run" / METRICS).read_bytes()
    with pytest.raises(SnapshotError, match="all 2 snapshots"):
        train(Recipe.load(recipe_file, ["snapshots.every=5"]), resume=True, warn=silent)
    assert SnapshotStore(tmp_path / "run" / "snapshots").list() == snapshots
    assert (tmp_path / "run" / METRICS).read_bytes() == metrics
