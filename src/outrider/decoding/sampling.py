"""From logits to a probability law, and from a law to a token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from outrider.errors import DecodingError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token; above, logits are divided by it.
        top_k: only the k most likely tokens; 0 means all.
        top_p: only the smallest set of tokens whose probability reaches this (Holtzman et al. 2020).
        seed: makes a run repeatable; None draws one. Under rejection sampling the text also depends on the
            draft widths, which in automatic mode follow the clock: fix the width, or use coupled sampling.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise DecodingError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k < 0:
            raise DecodingError(f"top-k must be 0 (all tokens) or more, not {self.top_k}")
        if self.seed is not None and not -2**63 <= self.seed < 2**63:
            raise DecodingError(f"the seed must fit in 64 bits, not {self.seed}")
        if not 0 < self.top_p <= 1:
            raise DecodingError(f"top-p must be above 0 and at most 1, not {self.top_p}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the law [n, V] (float32) that `sampling` makes of `logits` [n, V].

    Temperature, then top-k, then top-p, as `transformers` does. Ties at the k-th place are all kept.
    """
    # From the largest down and in float64, so that no temperature overflows.
    logits = logits.double()
    logits = (logits - logits.max(-1, keepdim=True).values) / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    law = logits.softmax(-1).float()
    if sampling.top_p < 1:
        ordered, order = law.sort(dim=-1, descending=True, stable=True)
        # A token stays if the more likely ones before it do not yet reach top_p.
        dropped = ordered.cumsum(-1) - ordered >= sampling.top_p
        law = law.masked_fill(dropped.scatter(-1, order, dropped), 0.0)
        law = law / law.sum(-1, keepdim=True)
    return law


class Choices(Protocol):
    """Where chance comes from. Tests put an enumeration of every outcome in its place."""

    def accept(self, probability: float) -> bool:
        """Return True with the given probability."""
        ...

    def choose(self, weights: Tensor) -> int:
        """Return an index with probability proportional to `weights` [V]."""
        ...


class SeededChoices:
    """Chance from one seeded generator on the CPU, whatever device the model is on."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def accept(self, probability: float) -> bool:
        """Return True with the given probability."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item() < probability

    def choose(self, weights: Tensor) -> int:
        """Return an index with probability proportional to `weights` [V], by inverting the cumulative sum."""
        cumulative = weights.double().cpu().cumsum(0)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        # `right=True` never lands on a weight of zero; the clamp guards the last rounding.
        index = int(torch.searchsorted(cumulative, point, right=True))
        return index if index < len(weights) else int(weights.nonzero()[-1])


class SharedNoise:
    """One draw of noise per position, the same for draft and target (Gumbel-max coupling).

    The token at a position is argmax(p / e) with e exponential noise that depends only on the seed and the
    position, which is an exact sample of p (Daliri et al. 2024, "Coupling without communication"). When
    draft and target use the same noise they tend to pick the same token, and what the target picks does
    not depend on what was proposed: a seed gives the same text with any draft, any width, or none.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._cached: dict[int, Tensor] = {}

    def pick(self, law: Tensor, position: int) -> int:
        """Return the token that the law [V] takes at `position`."""
        # Ids beyond a smaller vocabulary have noise of their own; shared ids share it.
        noise = self._noise(position, law.shape[-1])
        return int((law.double().cpu() / noise[:law.shape[-1]]).argmax())

    def _noise(self, position: int, size: int) -> Tensor:
        noise = self._cached.get(position)
        if noise is None or len(noise) < size:
            key = (self._seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9) % 2**63
            generator = torch.Generator().manual_seed(key)
            # Drawn in blocks of fixed size, so that a longer draw begins with the shorter one.
            blocks = [torch.empty(4096, dtype=torch.float64).exponential_(generator=generator)
                      for _ in range(-(-size // 4096))]
            noise = torch.cat(blocks)
            self._cached = {p: n for p, n in self._cached.items() if p > position - 64}
            self._cached[position] = noise
        return noise
