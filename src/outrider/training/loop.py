"""The training loop: pretraining and fine-tuning are the same verb, from scratch or from a model folder."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from outrider.console import Silent, Watcher, console, count
from outrider.corpus import Batch, ShuffledBatches, TokenCorpus, Tokenizer, Windows
from outrider.corpus.shards import MANIFEST
from outrider.devices import autocast, device_name, peak_flops, pick_device, synchronize
from outrider.errors import ConfigError, Interrupted, NonFiniteLossError, SnapshotError
from outrider.files import sha256_file, write_json
from outrider.model.folder import load_config, load_model, resolve_folder, save_model
from outrider.model.likelihood import Score, score
from outrider.model.llama import Llama
from outrider.recipe import Recipe
from outrider.training.objectives import Objective, distillation, next_token
from outrider.training.optimizers import build_optimizer, learning_rate
from outrider.training.signals import StopRequest
from outrider.training.snapshots import Progress, SnapshotStore, restore
from outrider.training.telemetry import METRICS, MetricsLog, Speedometer, summary_writer

#: Parts of a recipe that may differ when a run is continued: they do not touch what is computed.
_FREE_ON_RESUME = ("output", "evaluation", "snapshots", "logging")
_SCORED_AT_ONCE = 16_384


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves.

    Attributes:
        model: the model folder.
        metrics: the JSONL log.
        steps: optimiser steps done.
        tokens: tokens trained on.
        seconds: time spent in steps, over all sittings.
        loss: training loss of the last step, nats per token.
        validation: scores at the end, or None without a validation split.
        tokens_per_second: mean over the run.
    """

    model: Path
    metrics: Path
    steps: int
    tokens: int
    seconds: float
    loss: float
    validation: Score | None
    tokens_per_second: float


def train(recipe: Recipe, *, resume: bool = False, replace: bool = False, objective: Objective | None = None,
          watcher: Watcher | None = None, warn: Callable[[str], None] = console.print) -> TrainingResult:
    """Train a model as `recipe` says and write it as a model folder, `RUN/model`.

    Args:
        recipe: what to do.
        resume: continue from the run's newest good snapshot; without any snapshot, start.
        replace: start anew although the run's folder has results.
        objective: what to minimise; default: what the recipe says, next token or distillation.
        watcher: told of progress after every step.
        warn: given one line for each thing a person should know.

    Raises:
        ConfigError: the recipe does not fit the corpus or the machine, or the run exists already.
        CorpusError, ModelFolderError, SnapshotError: an input is damaged.
        NonFiniteLossError: the loss or gradient is NaN or infinite; snapshots stay.
        Interrupted: a signal came; the state was saved.
        DiskError: the disk is full; earlier snapshots stay.
    """
    run = _Run(recipe, objective, watcher or Silent(), warn)
    run.start(resume=resume, replace=replace)
    with StopRequest() as stop, MetricsLog(
            recipe.folder, continue_after=run.progress.step or None, finished=run.progress.step == recipe.steps,
            tensorboard=recipe.logging.tensorboard) as log:
        while run.progress.step < recipe.steps:
            run.step(log)
            done = run.progress.step
            if _due(done, recipe.evaluation.every) and done < recipe.steps:
                run.evaluate(log)
            if stop or _due(done, recipe.snapshots.every) or done == recipe.steps:
                run.save()
            if stop and done < recipe.steps:
                assert stop.signal_number is not None
                raise Interrupted(f"stopped after step {done}; saved in {recipe.folder}, continue with --resume",
                                  stop.signal_number)
        return run.finish(log)


class _Run:
    """The parts of one training run, and what each step does with them."""

    def __init__(self, recipe: Recipe, objective: Objective | None, watcher: Watcher,
                 warn: Callable[[str], None]) -> None:
        self.recipe, self.watcher, self.warn = recipe, watcher, warn
        settings = recipe.training
        if recipe.logging.tensorboard:
            summary_writer()  # missing, it must be missed before anything is touched
        self.device = pick_device(settings.device)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.corpus = TokenCorpus(recipe.data.path, "train")
        self.held_out = TokenCorpus(recipe.data.path, "validation")
        self.corpus_sha256 = sha256_file(self.corpus.folder / MANIFEST)
        self.batches = ShuffledBatches(Windows(self.corpus, settings.context), recipe.batch_windows, settings.seed)
        self.model = _build_model(recipe, self.corpus, self.device)
        self.objective = objective or _build_objective(recipe, self.corpus, self.device)
        self.forward: nn.Module = torch.compile(self.model) if settings.compile else self.model  # type: ignore[assignment]
        self.optimizer = build_optimizer(self.model, recipe.optimizer, self.device)
        self.store = SnapshotStore(recipe.folder / "snapshots", keep=recipe.snapshots.keep)
        self.progress = Progress()
        self.speed = Speedometer()
        self.loss = math.nan
        self.flops_per_token = self.model.config.training_flops_per_token(settings.context)
        self.peak = peak_flops(self.device, settings.precision)

    def start(self, *, resume: bool, replace: bool) -> None:
        """Restore the newest snapshot, or make sure that nothing is overwritten unasked."""
        recipe, folder = self.recipe, self.recipe.folder
        found = self.store.newest(self.warn) if resume and not replace else None
        if found is not None:
            path, state = found
            _check_same_run(recipe, state["recipe"], path)
            if state["corpus_sha256"] != self.corpus_sha256:
                raise SnapshotError(f"the corpus {recipe.data.path} changed since {path} was saved")
            self.progress = restore(path, state, self.model, self.optimizer)
            self.loss = self.progress.loss
            self.warn(f"continuing {recipe.name} after step {self.progress.step}")
        elif (self.store.list() or (folder / METRICS).exists()) and not replace:
            if not resume or self.store.list():
                raise ConfigError(f"{folder} holds a run; pass --resume to continue it or --force to start anew")
        elif replace:
            for path in self.store.list():
                shutil.rmtree(path)
        write_json(folder / "recipe.json", recipe.dump())
        self.speed = Speedometer()

    def step(self, log: MetricsLog) -> None:
        """Take one optimiser step and log it."""
        recipe, progress = self.recipe, self.progress
        started = time.perf_counter()
        batch = self.batches.batch(progress.position)
        rate = learning_rate(progress.step, recipe.steps, recipe.optimizer.lr, recipe.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.loss = self._backward(batch)
        limit = recipe.training.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit, foreach=True).item()
        if not (math.isfinite(self.loss) and math.isfinite(norm)):
            self._refuse(norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        progress.step += 1
        progress.loss = self.loss
        progress.tokens += batch.tokens
        progress.position = self.batches.advance(progress.position)
        progress.seconds += time.perf_counter() - started
        speed = self.speed.add(batch.tokens)
        mfu = speed * self.flops_per_token / self.peak if self.peak else None
        log.write({"step": progress.step, "tokens": progress.tokens, "loss": self.loss, "learning_rate": rate,
                   "gradient_norm": norm, "tokens_per_second": round(speed, 1), "mfu": mfu,
                   "epoch": progress.position.epoch, "window": progress.position.window,
                   "seconds": round(progress.seconds, 3)})
        utilisation = f"  MFU {100 * mfu:.0f} %" if mfu is not None else ""
        self.watcher.update(progress.step, recipe.steps, f"step {progress.step}/{recipe.steps}  loss {self.loss:.3f}  "
                            f"{count(speed)} tokens/s{utilisation}")

    def _backward(self, batch: Batch) -> float:
        """Accumulate the gradient of the mean loss over the whole batch; return that mean in nats."""
        settings = self.recipe.training
        size = settings.micro_batch or len(batch.inputs)
        total = torch.zeros((), device=self.device)
        self.model.train()
        for first in range(0, len(batch.inputs), size):
            inputs, targets = (torch.from_numpy(array[first:first + size]).to(self.device, non_blocking=True)
                               for array in (batch.inputs, batch.targets))
            with autocast(self.device, settings.precision):
                loss = self.objective(self.forward, inputs, targets)
            (loss / batch.tokens).backward()
            total += loss.detach()
        return total.item() / batch.tokens

    def evaluate(self, log: MetricsLog) -> Score | None:
        """Score the validation split and log it."""
        if len(self.held_out) < 2:
            return None
        started = time.perf_counter()
        settings = self.recipe.training
        batches = Windows(self.held_out, settings.context).in_order(
            max(1, _SCORED_AT_ONCE // settings.context), self.recipe.evaluation.tokens)
        scores = score(self.model, batches, self.held_out.bytes_per_token, self.device, settings.precision)
        log.write({"step": self.progress.step, "tokens": self.progress.tokens, "validation_loss": scores.loss,
                   "bits_per_byte": scores.bits_per_byte, "validation_tokens": scores.tokens})
        self.speed.pause(time.perf_counter() - started)
        return scores

    def save(self) -> None:
        """Write a snapshot."""
        started = time.perf_counter()
        self.store.save(self.model, self.optimizer, self.progress, self.recipe.dump(), self.corpus_sha256)
        self.speed.pause(time.perf_counter() - started)

    def finish(self, log: MetricsLog) -> TrainingResult:
        """Score, write the model folder, and sum up."""
        scores = self.evaluate(log)
        folder = save_model(self.model, self.recipe.folder / "model", tokenizer_from=self.corpus.folder, replace=True)
        write_json(folder / "training.json", {
            "recipe": self.recipe.dump(), "tokens": self.progress.tokens, "steps": self.progress.step,
            "device": device_name(self.device), "seconds": self.progress.seconds,
            "corpus": {"sources": [source.model_dump() for source in self.corpus.manifest.sources]},
            "bits_per_byte": scores.bits_per_byte if scores else None,
        })
        progress = self.progress
        return TrainingResult(folder, log.path, progress.step, progress.tokens, progress.seconds, self.loss, scores,
                              progress.tokens / progress.seconds)

    def _refuse(self, norm: float) -> None:
        what = "loss" if not math.isfinite(self.loss) else "gradient norm"
        value = self.loss if not math.isfinite(self.loss) else norm
        saved = self.store.list()
        advice = f"the last good snapshot is {saved[-1]}" if saved else "no snapshot had been saved yet"
        raise NonFiniteLossError(
            f"the {what} became {value} at step {self.progress.step + 1} (epoch {self.progress.position.epoch}, "
            f"window {self.progress.position.window}); {advice}; try a lower optimizer.lr or a longer schedule.warmup"
        )


def _build_model(recipe: Recipe, corpus: TokenCorpus, device: torch.device) -> Llama:
    tokenizer = corpus.manifest.tokenizer
    if recipe.model.start_from is not None:
        folder = resolve_folder(recipe.model.start_from)
        recipe.check_fits(load_config(folder), tokenizer.vocab_size)
        _check_same_tokenizer(folder, corpus)
        model = load_model(folder, dtype=torch.float32, device=device)
        return model.requires_grad_(True)
    shape = recipe.model_shape(tokenizer.vocab_size)
    eos = tokenizer.eos_id
    shape = shape.model_copy(update={"bos_token_id": tokenizer.bos_id,
                                     "eos_token_ids": () if eos is None else (eos,)})
    model = Llama(shape)
    # On the CPU, so that a seed gives the same weights on every device.
    model.reset_parameters(torch.Generator().manual_seed(recipe.training.seed))
    return model.to(device)


def _build_objective(recipe: Recipe, corpus: TokenCorpus, device: torch.device) -> Objective:
    if recipe.distillation.teacher is None:
        return next_token
    folder = resolve_folder(recipe.distillation.teacher)
    recipe.check_fits(load_config(folder), corpus.manifest.tokenizer.vocab_size)
    _check_same_tokenizer(folder, corpus)
    return distillation(load_model(folder, dtype=torch.float32, device=device), recipe.distillation.share)


def _check_same_tokenizer(folder: Path, corpus: TokenCorpus) -> None:
    if not (folder / "tokenizer.json").is_file():
        return
    if Tokenizer.load(folder).sha256 != corpus.manifest.tokenizer.sha256:
        raise ConfigError(
            f"the corpus {corpus.folder} was prepared with another tokenizer than the model {folder} has; "
            f"prepare it again with --tokenizer {folder}"
        )


def _check_same_run(recipe: Recipe, saved: dict, path: Path) -> None:
    now = recipe.dump()
    for section, values in now.items():
        if section in _FREE_ON_RESUME or values == saved.get(section):
            continue
        before = saved.get(section)
        if isinstance(values, dict) and isinstance(before, dict):
            key = next(key for key in {**before, **values} if values.get(key) != before.get(key))
            raise SnapshotError(f"{path} was made with {section}.{key} = {before.get(key)!r}, the recipe now says "
                                f"{values.get(key)!r}; restore it, or start anew with --force")
        raise SnapshotError(f"{path} was made with {section} = {before!r}, the recipe now says {values!r}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
