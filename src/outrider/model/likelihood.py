"""How surprised a model is by text: the one place where logits become a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text.

    Attributes:
        loss: mean nats per predicted token.
        bits_per_byte: code length per byte of text, which compares models of different vocabularies.
        tokens: how many tokens were predicted.
    """

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[TokenBatch], bytes_per_token: float, device: torch.device,
          precision: str = "fp32") -> Score:
    """Score `model` on `batches`; each window is predicted without what came before it.

    Args:
        model: maps ids [B, T] to logits [B, T, V].
        batches: what to predict.
        bytes_per_token: UTF-8 bytes of text that a predicted token stands for, on average over the text.
        device: where the model is.
        precision: "fp32" or "bf16" matrix products.
    """
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    for batch in batches:
        inputs, targets = (torch.from_numpy(array).to(device) for array in (batch.inputs, batch.targets))
        with autocast(device, precision):
            nats += summed_loss(model, inputs, targets).double().item()
        tokens += int((batch.targets != IGNORED).sum())
    model.train(was_training)
    return Score(nats / tokens, nats / (math.log(2) * bytes_per_token * tokens), tokens)
