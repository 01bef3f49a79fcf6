"""Proposers guess what the target will say next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from outrider.decoding.engine import Engine
from outrider.decoding.sampling import Choices, Sampling, SharedNoise, probabilities


@dataclass(frozen=True)
class Proposal:
    """Guessed tokens, and the laws [n, V] they were drawn from (None if they were not drawn)."""

    tokens: list[int]
    laws: Tensor | None = None


class Proposer(Protocol):
    """Anything that guesses."""

    def begin(self, prompt: Sequence[int], capacity: int, sampling: Sampling,
              chance: Choices | SharedNoise | None) -> None:
        """Prepare for one sequence that starts with `prompt` and has at most `capacity` positions.

        `sampling` is how the target is decoded; `chance` is None for greedy decoding.
        """
        ...

    def propose(self, context: Sequence[int], budget: int) -> Proposal:
        """Guess at most `budget` tokens after `context` (prompt and accepted output so far)."""
        ...

    def synchronize(self) -> None:
        """Wait until results are there (for timing)."""
        ...


class ModelProposer:
    """A small language model as the draft.

    It keeps its own cache and brings it up to date when asked, so it may be skipped for any number of rounds.
    """

    def __init__(self, engine: Engine, shared: int, target_vocabulary: int) -> None:
        """Wrap the draft's engine.

        Args:
            engine: the draft.
            shared: ids below this mean the same to draft and target.
            target_vocabulary: width of the laws the target's verification works on.
        """
        self.engine = engine
        self._shared, self._target_vocabulary = shared, target_vocabulary
        # What stands in the draft's context for a token it does not have.
        eos = engine.config.eos_token_ids
        self._stand_in = eos[0] if eos else 0
        self._cached: list[int] = []
        self._settled = 0
        self._capacity = 0
        self._sampling = Sampling()
        self._chance: Choices | SharedNoise | None = None

    def begin(self, prompt: Sequence[int], capacity: int, sampling: Sampling,
              chance: Choices | SharedNoise | None) -> None:
        """Cache the prompt; beyond the draft's own positions it will propose nothing."""
        self._capacity = min(capacity, self.engine.config.max_position_embeddings)
        self._sampling, self._chance = sampling, chance
        self.engine.start(1, self._capacity)
        self._cached = list(prompt[:-1]) if len(prompt) <= self._capacity else []
        self._settled = len(self._cached)
        self.engine.prefill([self._known(self._cached)])

    def propose(self, context: Sequence[int], budget: int) -> Proposal:
        """Run the draft for up to `budget` tokens."""
        budget = min(budget, self._capacity - len(context) + 1)
        if budget <= 0:
            return Proposal([])
        logits = self._catch_up(context)
        tokens: list[int] = []
        laws: list[Tensor] = []
        while True:
            token, law = self._next(logits, len(context) + len(tokens))
            tokens.append(token)
            if law is not None:
                laws.append(law)
            if len(tokens) == budget:
                break
            logits = self._extend([token])
        return Proposal(tokens, torch.stack(laws) if laws else None)

    def synchronize(self) -> None:
        """Wait for the device."""
        self.engine.synchronize()

    def _catch_up(self, context: Sequence[int]) -> Tensor:
        """Make the cache hold `context`, reusing what agrees; return the logits [V] after its last token."""
        # All of the last context still stands; compare only what was guessed beyond it.
        limit = min(len(self._cached), len(context) - 1)
        keep = min(self._settled, limit)
        while keep < limit and self._cached[keep] == context[keep]:
            keep += 1
        self._settled = len(context)
        self.engine.truncate([keep])
        self._cached = self._cached[:keep]
        new = list(context[keep:])
        if len(new) > 1:
            self.engine.prefill([self._known(new[:-1])])
            self._cached += new[:-1]
        return self._extend(new[-1:])

    def _extend(self, tokens: list[int]) -> Tensor:
        logits = self.engine.extend(torch.tensor([self._known(tokens)]))[0, -1]
        self._cached += tokens
        return logits[:self._shared]

    def _known(self, tokens: list[int]) -> list[int]:
        size = self.engine.config.vocab_size
        return [token if token < size else self._stand_in for token in tokens]

    def _next(self, logits: Tensor, position: int) -> tuple[int, Tensor | None]:
        """Choose the next guess; return it and, if it was drawn for rejection sampling, its law [V]."""
        if self._chance is None:
            return int(logits.argmax()), None
        law = probabilities(logits[None], self._sampling)[0]
        if isinstance(self._chance, SharedNoise):
            return self._chance.pick(law, position), None
        token = self._chance.choose(law)
        return token, F.pad(law, (0, self._target_vocabulary - self._shared))
