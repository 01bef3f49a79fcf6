"""Recipes: one TOML file says what to train, on what, and how.

Every key has a type and a range; unknown keys are refused with the nearest known name. Dotted overrides
(`training.tokens=2M`) replace single values, and the resolved recipe is kept with every run and snapshot.
See docs/recipes.md.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from outrider.errors import ConfigError
from outrider.model.config import ModelConfig, describe_validation_error
from outrider.model.presets import preset

_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(value: Any) -> Any:
    """Read `2M`, `1.5B`, `670_000` or a plain number as an integer; leave anything else for pydantic to refuse."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:_\d+)*(?:\.\d+)?)\s*([kKmMbBtT]?)", value.strip())
        number = Decimal(match[1].replace("_", "")) * _SUFFIXES[match[2].lower()] if match else Decimal("0.5")
        if number != int(number):
            raise ValueError("write a whole number, or one with k, M, B or T, such as 2M")
        return int(number)
    if isinstance(value, bool):
        raise ValueError("write a whole number, not true or false")
    return value


Count = Annotated[int, BeforeValidator(parse_count)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelSection(_Section):
    """The model: a preset or a model folder to start from; any other key overrides a field of the shape."""

    model_config = ConfigDict(extra="allow", frozen=True)

    preset: str | None = None
    start_from: str | None = Field(default=None, description="model folder whose weights training continues")


class DataSection(_Section):
    """What to learn from."""

    path: str = Field(description="corpus folder made by 'outrider data prepare'")


class TrainingSection(_Section):
    """How much, in what portions, and with what precision."""

    tokens: Count = Field(gt=0, description="tokens to train on")
    batch_tokens: Count = Field(default=16_384, gt=0, description="tokens in one optimiser step, over all processes")
    context: Count = Field(default=512, gt=1, description="tokens a window predicts")
    micro_batch: int = Field(default=0, ge=0, description="windows in one forward pass on one device; 0: all of them")
    precision: Literal["fp32", "bf16"] = "bf16"
    clip: float = Field(default=1.0, ge=0, description="largest gradient norm; 0: no limit")
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: PyTorch's choice")
    compile: bool = Field(default=False, description="compile the model with torch.compile")


class OptimizerSection(_Section):
    """AdamW (Loshchilov & Hutter 2019), or Muon for the matrices inside the blocks and AdamW for the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=6e-4, gt=0, le=1, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)


class ScheduleSection(_Section):
    """Learning rate over time: linear warm-up, then cosine, or stable with a linear decay at the end (WSD)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: Count = Field(default=0, ge=0, description="warm-up in steps")
    final: float = Field(default=0.1, ge=0, le=1, description="last learning rate as a share of the peak")
    decay: float = Field(default=0.2, gt=0, le=1, description="share of the steps that decay (wsd)")


class DistillationSection(_Section):
    """Learn from a larger model's laws of the next token, not from the text alone."""

    teacher: str | None = Field(default=None, description="model folder of the target to imitate")
    share: float = Field(default=1.0, gt=0, le=1, description="share of the loss that is the teacher's")


class EvaluationSection(_Section):
    """Bits per byte on the validation split, always at the end and, if wished, on the way."""

    every: Count = Field(default=0, ge=0, description="steps between evaluations; 0: only at the end")
    tokens: Count = Field(default=0, ge=0, description="validation tokens to use; 0: all")


class SnapshotSection(_Section):
    """Saved states to continue from."""

    every: Count = Field(default=0, ge=0, description="steps between snapshots; 0: only at the end or when stopped")
    keep: int = Field(default=2, ge=1, description="how many to keep")


class LoggingSection(_Section):
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = False


class Recipe(_Section):
    """Everything a training run needs to know."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    output: str = Field(default="", description="run folder; default: runs/NAME")
    model: ModelSection
    data: DataSection
    training: TrainingSection
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    distillation: DistillationSection = DistillationSection()
    evaluation: EvaluationSection = EvaluationSection()
    snapshots: SnapshotSection = SnapshotSection()
    logging: LoggingSection = LoggingSection()

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a TOML recipe and apply `section.key=value` overrides.

        Raises:
            ConfigError: no such file, not TOML, an unknown key, or an impossible value.
        """
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"no recipe {path}")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid TOML: {error}") from error
        for override in overrides:
            _apply(values, override)
        return cls.build(values, str(path))

    @classmethod
    def build(cls, values: dict[str, Any], where: str = "recipe") -> Recipe:
        """Check `values` and return the recipe; `where` starts the message if they are wrong.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        try:
            recipe = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(f"{where}: {describe_validation_error(error)}{_suggestion(error)}") from error
        training = recipe.training
        if training.batch_tokens % training.context:
            raise ConfigError(
                f"{where}: training.batch_tokens {training.batch_tokens} is not a multiple of "
                f"training.context {training.context}"
            )
        if (recipe.model.preset is None) == (recipe.model.start_from is None) and not recipe.model.model_extra:
            raise ConfigError(f"{where}: [model] needs either preset, start_from, or the fields of a shape")
        if recipe.model.start_from is not None and (recipe.model.preset or recipe.model.model_extra):
            raise ConfigError(f"{where}: [model] start_from takes the folder's shape; remove the other keys")
        for key in recipe.model.model_extra or {}:
            if key not in ModelConfig.model_fields:
                raise ConfigError(f"{where}: model: unknown key '{key}'" + _nearest(
                    key, [*ModelSection.model_fields, *ModelConfig.model_fields]))
        if recipe.model.start_from is None:
            try:  # refuse an impossible shape before anything is read
                recipe.model_shape(tokenizer_size=1)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
        return recipe

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output or f"runs/{self.name}")

    @property
    def steps(self) -> int:
        """Optimiser steps: enough whole batches for `training.tokens`."""
        return -(-self.training.tokens // self.training.batch_tokens)

    @property
    def batch_windows(self) -> int:
        """Windows in one optimiser step."""
        return self.training.batch_tokens // self.training.context

    def model_shape(self, tokenizer_size: int) -> ModelConfig:
        """Return the shape to train from scratch.

        A `vocab_size` in the recipe is kept; otherwise a preset's, if the tokenizer fits in it; otherwise
        the tokenizer's.

        Raises:
            ConfigError: an impossible shape, a vocabulary smaller than the tokenizer's, or a context
                longer than the model's positions.
        """
        fields = dict(self.model.model_extra or {})
        if self.model.preset is not None:
            shape = preset(self.model.preset, **fields)
            if "vocab_size" not in fields and shape.vocab_size < tokenizer_size:
                shape = preset(self.model.preset, **{**fields, "vocab_size": tokenizer_size})
        else:
            try:
                shape = ModelConfig.model_validate({"vocab_size": tokenizer_size, **fields})
            except ValidationError as error:
                raise ConfigError(f"[model] {describe_validation_error(error)}") from error
        self.check_fits(shape, tokenizer_size)
        return shape

    def check_fits(self, shape: ModelConfig, tokenizer_size: int) -> None:
        """Raise `ConfigError` unless `shape` can hold the tokenizer's ids and the recipe's context."""
        if shape.vocab_size < tokenizer_size:
            raise ConfigError(
                f"the model has {shape.vocab_size} tokens and the corpus's tokenizer {tokenizer_size}; "
                "prepare the corpus with the model's tokenizer"
            )
        if self.training.context > shape.max_position_embeddings:
            raise ConfigError(
                f"training.context {self.training.context} is longer than the model's rotary positions allow "
                f"(max_position_embeddings {shape.max_position_embeddings})"
            )

    def dump(self) -> dict[str, Any]:
        """Return every key with its resolved value, as JSON types."""
        return self.model_dump(mode="json")


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted key in `values`; the value is read as TOML if it parses, else as a string."""
    key, equals, raw = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"override '{override}': write section.key=value")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    *sections, last = key.strip().split(".")
    table = values
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
    table[last] = value


def _suggestion(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] != "extra_forbidden":
        return ""
    section: Any = Recipe
    for part in first["loc"][:-1]:
        section = section.model_fields[str(part)].annotation
    return _nearest(str(first["loc"][-1]), list(section.model_fields))


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys: {', '.join(known)}"
