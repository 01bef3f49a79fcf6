"""Batches of training windows, in an order that any process can compute from two integers.

The token stream is cut into windows of `context` targets; window i predicts tokens i*context+1 onwards, so
every token but the very first is predicted exactly once an epoch, and the shorter last window is kept.
Windows are visited in an order given by a keyed permutation, computed and never stored: resuming costs
nothing and does not depend on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from outrider.corpus.shards import TokenCorpus
from outrider.errors import CorpusError

#: Target value that no loss counts (PyTorch's `ignore_index`).
IGNORED = -100
_ROUNDS = 8


@dataclass(frozen=True)
class Position:
    """How far a run has read: whole epochs, and windows of the current one."""

    epoch: int = 0
    window: int = 0


@dataclass(frozen=True)
class Batch:
    """Windows to learn from: `inputs` and `targets`, both [windows, context] int64; IGNORED targets are padding."""

    inputs: np.ndarray
    targets: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of targets that count."""
        return int((self.targets != IGNORED).sum())


class Windows:
    """The windows of a corpus, by number, in the order of the text."""

    def __init__(self, corpus: TokenCorpus, context: int) -> None:
        if len(corpus) < 2:
            raise CorpusError(f"the {corpus.split} split of {corpus.folder} has {len(corpus)} tokens; 2 are needed")
        self.corpus, self.context = corpus, context

    def __len__(self) -> int:
        return -(-(len(self.corpus) - 1) // self.context)

    def batch(self, numbers: np.ndarray) -> Batch:
        """Read windows `numbers` [n] as one batch."""
        inputs = np.zeros((len(numbers), self.context), np.int64)
        targets = np.full((len(numbers), self.context), IGNORED, np.int64)
        for row, number in enumerate(numbers):
            tokens = self.corpus.read(int(number) * self.context, self.context + 1)
            count = len(tokens) - 1
            inputs[row, :count] = tokens[:-1]
            targets[row, :count] = tokens[1:]
        return Batch(inputs, targets)

    def in_order(self, batch_windows: int, tokens: int = 0) -> Iterator[Batch]:
        """Yield batches from the start of the text, for about `tokens` tokens (0: all of it)."""
        last = len(self) if not tokens else min(len(self), -(-tokens // self.context))
        for first in range(0, last, batch_windows):
            yield self.batch(np.arange(first, min(first + batch_windows, last)))


class ShuffledBatches:
    """An endless sequence of global batches of `batch_windows` windows.

    A batch that meets the end of an epoch is filled from the next one, so each epoch visits every window once.
    """

    def __init__(self, windows: Windows, batch_windows: int, seed: int) -> None:
        self.windows, self.batch_windows, self.seed = windows, batch_windows, seed

    def advance(self, position: Position, batches: int = 1) -> Position:
        """Return where reading stands after `batches` more global batches."""
        total = position.epoch * len(self.windows) + position.window + batches * self.batch_windows
        return Position(*divmod(total, len(self.windows)))

    def numbers(self, position: Position) -> np.ndarray:
        """Return the window numbers [batch_windows] of the global batch at `position`."""
        count = len(self.windows)
        absolute = position.epoch * count + position.window + np.arange(self.batch_windows, dtype=np.int64)
        epochs, offsets = np.divmod(absolute, count)
        numbers = np.empty_like(absolute)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            numbers[chosen] = permute(offsets[chosen], count, (self.seed, int(epoch)))
        return numbers

    def batch(self, position: Position, *, rank: int = 0, world: int = 1) -> Batch:
        """Read this process's share of the global batch at `position`: every `world`-th window from `rank`."""
        return self.windows.batch(self.numbers(position)[rank::world])


def permute(indices: np.ndarray, count: int, key: tuple[int, int]) -> np.ndarray:
    """Map `indices` [n] within range(count) through the permutation that `key` selects.

    A balanced Feistel network on the next even number of bits, walked along its cycle until it lands below
    `count` (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = max(1, ((max(count - 1, 1)).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)
    values = np.asarray(indices, dtype=np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> shift, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values = values.copy()
        values[outside] = (left << shift) | right
        outside = values >= np.uint64(count)
    return values.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit integers (the finaliser of SplitMix64; Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
