"""What happened while decoding. Schema in docs/formats.md; the same names serve every report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Statistics:
    """Counts and times of one request, or of several added up.

    Attributes:
        generated: tokens given out.
        target_passes: forward passes of the target after the prompt's.
        drafted: tokens proposed.
        evaluated: proposed tokens whose predecessors all stood, so that the target had a say.
        accepted: proposed tokens that stood.
        evaluated_per_position, accepted_per_position: the same by place in the proposal.
        zero_accept_rounds: passes in which something was proposed and nothing stood.
        widths: how often each width was drafted.
        prefill_seconds, draft_seconds, target_seconds, total_seconds: wall-clock times.
    """

    generated: int = 0
    target_passes: int = 0
    drafted: int = 0
    evaluated: int = 0
    accepted: int = 0
    evaluated_per_position: list[int] = field(default_factory=list)
    accepted_per_position: list[int] = field(default_factory=list)
    zero_accept_rounds: int = 0
    widths: dict[int, int] = field(default_factory=dict)
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    total_seconds: float = 0.0

    def record_round(self, drafted: int, accepted: int) -> None:
        """Count one target pass over `drafted` proposed tokens of which `accepted` stood."""
        self.target_passes += 1
        self.drafted += drafted
        self.accepted += accepted
        evaluated = min(accepted + 1, drafted)
        self.evaluated += evaluated
        self.zero_accept_rounds += drafted > 0 and accepted == 0
        self.widths[drafted] = self.widths.get(drafted, 0) + 1
        _count(self.evaluated_per_position, evaluated)
        _count(self.accepted_per_position, accepted, size=len(self.evaluated_per_position))

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens per target pass, the target's own token included."""
        return 1 + self.accepted / self.target_passes if self.target_passes else None

    @property
    def acceptance_per_position(self) -> list[float]:
        """For each place in the proposal: of the tokens the target had a say on, the share that stood."""
        pairs = zip(self.accepted_per_position, self.evaluated_per_position, strict=True)
        return [accepted / evaluated for accepted, evaluated in pairs]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, the prompt's pass not counted."""
        return self.generated / max(self.total_seconds - self.prefill_seconds, 1e-9)

    def add(self, other: Statistics) -> None:
        """Add another request's counts and times."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(value, list):
                size = max(len(mine), len(value))
                padded = zip(mine + [0] * (size - len(mine)), value + [0] * (size - len(value)), strict=True)
                setattr(self, name, [a + b for a, b in padded])
            elif isinstance(value, dict):
                for key, times in value.items():
                    mine[key] = mine.get(key, 0) + times
            else:
                setattr(self, name, mine + value)

    def dump(self) -> dict[str, Any]:
        """Return counts, times and the rates derived from them, as JSON types."""
        widths = {str(width): times for width, times in sorted(self.widths.items())}
        return {**vars(self), "widths": widths, "acceptance_rate": self.acceptance_rate,
                "mean_accepted_length": self.mean_accepted_length,
                "acceptance_per_position": self.acceptance_per_position,
                "tokens_per_second": self.tokens_per_second}


def _count(counts: list[int], upto: int, size: int = 0) -> None:
    """Add one to the first `upto` places, growing the list to at least `size`."""
    size = max(size, upto)
    counts += [0] * (size - len(counts))
    for index in range(upto):
        counts[index] += 1
