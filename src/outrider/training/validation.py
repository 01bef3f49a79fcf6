"""Bits per byte on held-out text while a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outrider.corpus import TokenCorpus, Windows
from outrider.model.likelihood import bits_per_byte, total_nats
from outrider.model.llama import Llama

BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Validation:
    """Scores on a validation split: mean nats per token, and bits per byte of text."""

    loss: float
    bits_per_byte: float
    tokens: int


def validate(model: Llama, corpus: TokenCorpus, context: int, device: torch.device, precision: str,
             tokens: int = 0) -> Validation | None:
    """Score `model` on a corpus split in windows of `context`, from its start.

    Every token but the first is predicted once; a window sees nothing of the one before. With `tokens`
    set, only about so many are used, and the bytes they stand for are taken in proportion.

    Returns:
        The scores, or None if the split is empty.
    """
    if len(corpus) < 2:
        return None
    windows = Windows(corpus, context)
    was_training = model.training
    model.eval()
    nats, predicted = total_nats(model, windows.in_order(max(1, BATCH_TOKENS // context), tokens), device, precision)
    model.train(was_training)
    share = predicted / (len(corpus) - 1)
    return Validation(nats / predicted, bits_per_byte(nats, share * corpus.totals.bytes), predicted)
