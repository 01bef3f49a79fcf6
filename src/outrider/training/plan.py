"""What a recipe will need, before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outrider.corpus import TokenCorpus
from outrider.devices import PEAK_BF16, device_name, peak_flops, pick_device
from outrider.errors import ConfigError
from outrider.model.config import ModelConfig
from outrider.model.folder import load_config, resolve_folder
from outrider.recipe import Recipe

#: Share of the peak that a well-kept loop reaches on a model of this size (docs/recipes.md has the sources).
ASSUMED_MFU = 0.40
PLANNED_DEVICES = ("MI250", "MI300X", "A100", "H100", "H200", "RTX 4090")
_CPU_MFU = 0.20
# Weights, gradients and AdamW's two moments, all float32.
_STATE_BYTES = 16
_SNAPSHOT_BYTES = 12


@dataclass(frozen=True)
class Plan:
    """Needs of a training run. Bytes, FLOPs and seconds.

    Attributes:
        time_seconds: by device, on one of each, at the share of peak in `assumed_mfu`; this machine's own
            device is listed under its name.
    """

    name: str
    parameters: int
    matmul_parameters: int
    tokens: int
    steps: int
    epochs: float | None
    flops_per_token: float
    total_flops: float
    state_bytes: int
    activation_bytes: int
    snapshot_bytes: int
    disk_bytes: int
    assumed_mfu: dict[str, float]
    time_seconds: dict[str, float]

    def dump(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return asdict(self)


def plan(recipe: Recipe) -> Plan:
    """Work out what `recipe` needs. The corpus is looked at if it is there already.

    Raises:
        ConfigError, CorpusError, ModelFolderError: the recipe cannot run as it stands.
    """
    shape, epochs = _shape_and_epochs(recipe)
    settings = recipe.training
    flops = shape.training_flops_per_token(settings.context)
    total = flops * recipe.steps * settings.batch_tokens
    snapshot = _SNAPSHOT_BYTES * shape.num_parameters
    device = pick_device(settings.device)
    here = device_name(device)
    speeds: dict[str, float] = {name: PEAK_BF16[name] * ASSUMED_MFU for name in PLANNED_DEVICES}
    mfu: dict[str, float] = dict.fromkeys(PLANNED_DEVICES, ASSUMED_MFU)
    if peak := peak_flops(device, settings.precision):
        mfu[here] = _CPU_MFU if device.type == "cpu" else ASSUMED_MFU
        speeds[here] = peak * mfu[here]
    return Plan(
        name=recipe.name, parameters=shape.num_parameters, matmul_parameters=shape.num_matmul_parameters,
        tokens=recipe.steps * settings.batch_tokens, steps=recipe.steps, epochs=epochs, flops_per_token=flops,
        total_flops=total, state_bytes=_STATE_BYTES * shape.num_parameters,
        activation_bytes=_activation_bytes(shape, recipe), snapshot_bytes=snapshot,
        disk_bytes=(recipe.snapshots.keep + 1) * snapshot + 4 * shape.num_parameters,
        assumed_mfu=mfu, time_seconds={name: total / speed for name, speed in speeds.items()})


def _shape_and_epochs(recipe: Recipe) -> tuple[ModelConfig, float | None]:
    prepared = Path(recipe.data.path).exists()
    corpus = TokenCorpus(recipe.data.path, "train", verify=False) if prepared else None
    size = corpus.manifest.tokenizer.vocab_size if corpus else 1
    if recipe.model.start_from is not None:
        shape = load_config(resolve_folder(recipe.model.start_from))
        recipe.check_fits(shape, size)
    elif corpus is None and recipe.model.preset is None and "vocab_size" not in (recipe.model.model_extra or {}):
        raise ConfigError(f"the vocabulary is not known before {recipe.data.path} is prepared; "
                          "prepare it, or set model.vocab_size")
    else:
        shape = recipe.model_shape(size)
    return shape, recipe.training.tokens / len(corpus) if corpus else None


def _activation_bytes(shape: ModelConfig, recipe: Recipe) -> int:
    """Estimate what one micro-batch keeps for the backward pass, without recomputation."""
    settings = recipe.training
    windows = settings.micro_batch or recipe.batch_windows
    width = 2 if settings.precision == "bf16" else 4
    heads = shape.head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads)
    # Per layer: two normalised inputs and two residuals (float32), the projections and their rotated
    # copies, attention's output, and SwiGLU's gate, up, activation and product.
    layer = 4 * 4 * shape.hidden_size + width * (2 * heads + shape.hidden_size + 4 * shape.intermediate_size)
    # The logits in the product's precision, in float32, and their gradient.
    head = shape.vocab_size * (width + 4 + 4)
    return windows * settings.context * (shape.num_hidden_layers * layer + head)
