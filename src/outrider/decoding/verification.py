"""How much of a proposal stands. Pure functions: no model in sight.

Each is proved in tests/decoding/test_verification.py by enumerating every outcome on small vocabularies:
the law of the output equals the target's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from outrider.decoding.sampling import Choices


@dataclass(frozen=True)
class Verdict:
    """The first `accepted` tokens of the proposal stand and `token` follows them."""

    accepted: int
    token: int


def verify_matching(chosen: Sequence[int], proposal: Sequence[int]) -> Verdict:
    """Accept proposed tokens while they are what the target chose.

    Args:
        chosen: what the target takes after 0, 1, .. proposed tokens, len(proposal) + 1 of them: its most
            likely tokens when decoding greedily, or its picks under shared noise.
        proposal: the proposed tokens.
    """
    accepted = 0
    while accepted < len(proposal) and proposal[accepted] == chosen[accepted]:
        accepted += 1
    return Verdict(accepted, chosen[accepted])


def verify_rejection(target: Tensor, draft: Tensor | None, proposal: Sequence[int], choices: Choices) -> Verdict:
    """Token-level rejection sampling (Leviathan et al. 2023; Chen et al. 2023).

    Proposed token x is accepted with probability min(1, p(x) / q(x)); after the first rejection the token
    is drawn from max(p - q, 0), normalised; if all stand, one more is drawn from the target's last law.

    Args:
        target: the target's laws after 0, 1, .. proposed tokens [n + 1, V].
        draft: the laws the proposal was drawn from [n, V]; None if it was not drawn but determined.
        proposal: the n proposed tokens.
        choices: the source of chance.
    """
    for index, token in enumerate(proposal):
        p = target[index]
        # A token that its own law excludes was not drawn from it (a damaged draft): it counts as determined.
        q = draft[index] if draft is not None and draft[index, token] > 0 else None
        ratio = float(p[token]) / (1.0 if q is None else float(q[token]))
        if choices.accept(min(1.0, ratio)):
            continue
        if q is None:
            residual = p.clone()
            residual[token] = 0
        else:
            residual = (p - q).clamp(min=0)
        # The two laws agree to the last bit: nothing is left over, and p is its own correction.
        return Verdict(index, choices.choose(residual if residual.sum() > 0 else p))
    return Verdict(len(proposal), choices.choose(target[len(proposal)]))
