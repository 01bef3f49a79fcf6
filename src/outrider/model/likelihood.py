"""How surprised a model is by text: the one place where logits become a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from outrider.devices import autocast

#: Target value that does not count.
IGNORED = -100


class TokenBatch(Protocol):
    """Inputs and targets [windows, time] int64, padded with ignored targets."""

    @property
    def inputs(self) -> np.ndarray: ...  # noqa: D102
    @property
    def targets(self) -> np.ndarray: ...  # noqa: D102


def summed_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of `targets` [B, T] summed over counted positions, in nats, float32."""
    logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def total_nats(model: nn.Module, batches: Iterable[TokenBatch], device: torch.device,
               precision: str = "fp32") -> tuple[float, int]:
    """Return the summed loss in nats over `batches`, and how many tokens were predicted."""
    nats, tokens = 0.0, 0
    for batch in batches:
        inputs, targets = (torch.from_numpy(array).to(device) for array in (batch.inputs, batch.targets))
        with autocast(device, precision):
            nats += summed_loss(model, inputs, targets).double().item()
        tokens += int((batch.targets != IGNORED).sum())
    return nats, tokens


def bits_per_byte(nats: float, bytes_of_text: float) -> float:
    """Return the code length per byte of text, which compares models of different vocabularies."""
    return nats / (math.log(2) * bytes_of_text)
