"""How many tokens to draft next: the number that promises the most tokens per second, and none if none does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from outrider.errors import DecodingError

MAX_WIDTH = 16


@dataclass(frozen=True)
class Round:
    """What a round of decoding did and took, in seconds."""

    drafted: int
    accepted: int
    draft_seconds: float
    target_seconds: float


class Controller(Protocol):
    """Picks each round's budget."""

    def width(self) -> int:
        """Return how many tokens to draft next; zero is an allowed answer."""
        ...

    def observe(self, round_: Round) -> None:
        """Learn from a finished round."""
        ...


class FixedWidth:
    """Always the same budget."""

    def __init__(self, width: int) -> None:
        if not 0 <= width <= MAX_WIDTH:
            raise DecodingError(f"the draft width must be from 0 to {MAX_WIDTH}, not {width}")
        self._width = width

    def width(self) -> int:
        """Return the budget."""
        return self._width

    def observe(self, round_: Round) -> None:
        """Learn nothing."""


@dataclass
class CostModel:
    """Seconds of a target pass by number of tokens, and of a draft step; kept current by measurement.

    Attributes:
        target: seconds of a pass over n tokens, for measured n.
        draft: seconds of one draft step.
    """

    target: dict[int, float] = field(default_factory=dict)
    draft: float = 0.0
    smoothing: float = 0.1

    def observe(self, round_: Round, *, draft_was_current: bool = True) -> None:
        """Fold in a round's times. A pause of the machine (three times the usual) says nothing about cost, nor
        does the drafting of a round in which the draft first had to catch up.
        """
        n = round_.drafted + 1
        usual = self.target_seconds(n)
        seconds = min(round_.target_seconds, 3 * usual) if usual else round_.target_seconds
        self.target[n] = usual + self.smoothing * (seconds - usual) if usual else seconds
        if round_.drafted and draft_was_current:
            step = round_.draft_seconds / round_.drafted
            step = min(step, 3 * self.draft) if self.draft else step
            self.draft = self.draft + self.smoothing * (step - self.draft) if self.draft else step

    def target_seconds(self, n: int) -> float:
        """Return the cost of a pass over n tokens: measured, or on the line between its measured neighbours."""
        if not self.target:
            return 0.0
        if n in self.target:
            return self.target[n]
        below = max((m for m in self.target if m < n), default=None)
        above = min((m for m in self.target if m > n), default=None)
        if below is None or above is None:
            return self.target[above if below is None else below]  # type: ignore[index]
        share = (n - below) / (above - below)
        return self.target[below] + share * (self.target[above] - self.target[below])


class AdaptiveWidth:
    """Maximises expected tokens per second, from measured costs and the acceptance seen so far.

    With a_i the chance that place i stands once all before it did, width w yields 1 + sum_j prod_{i<=j} a_i
    tokens in target(w + 1) + w x draft seconds. A place is counted only when the target had a say on it, so
    a rejection early in a proposal says nothing about later places (censoring). Old evidence fades. At
    width zero a short proposal is tried now and then, ever more rarely while it keeps failing.
    """

    PRIOR = 0.7
    PRIOR_WEIGHT = 2.0
    FADING = 0.98
    PROBE_WIDTH = 2
    PROBE_AFTER, PROBE_LIMIT = 8, 128

    def __init__(self, costs: CostModel, max_width: int = 8) -> None:
        self.costs, self.max_width = costs, min(max_width, MAX_WIDTH)
        self._stood = [0.0] * self.max_width
        self._tried = [0.0] * self.max_width
        self._idle = 0
        self._patience = self.PROBE_AFTER

    def width(self) -> int:
        """Return the best width, or a probe's."""
        best = max(range(self.max_width + 1), key=self.tokens_per_second)
        if best > 0:
            self._patience = self.PROBE_AFTER
            return best
        if self._idle >= self._patience:
            self._patience = min(2 * self._patience, self.PROBE_LIMIT)
            return min(self.PROBE_WIDTH, self.max_width)
        return 0

    def observe(self, round_: Round) -> None:
        """Learn acceptance and costs from a round."""
        self.costs.observe(round_, draft_was_current=self._idle == 0)
        if round_.drafted == 0:
            self._idle += 1
            return
        self._idle = 0
        for place in range(min(round_.drafted, round_.accepted + 1, self.max_width)):
            self._tried[place] = self.FADING * self._tried[place] + 1
            self._stood[place] = self.FADING * self._stood[place] + (place < round_.accepted)

    def acceptance(self) -> list[float]:
        """Return a_i for each place: what was seen, leaning on the place before it while little was."""
        rates, before = [], self.PRIOR
        for stood, tried in zip(self._stood, self._tried, strict=True):
            before = (stood + self.PRIOR_WEIGHT * before) / (tried + self.PRIOR_WEIGHT)
            rates.append(before)
        return rates

    def tokens_per_second(self, width: int) -> float:
        """Return the expected rate at `width`."""
        tokens, survival = 1.0, 1.0
        for rate in self.acceptance()[:width]:
            survival *= rate
            tokens += survival
        return tokens / max(self.costs.target_seconds(width + 1) + width * self.costs.draft, 1e-9)
