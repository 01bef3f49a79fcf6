"""Verification is lossless: shown by enumerating every outcome, exactly, in float64.

The target's and the draft's laws depend on everything that came before (a random table for every prefix).
Every proposal is weighted by its probability under the draft, every decision inside the verifier by its own,
and the law of what comes out is compared with the target's own to 1e-12.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from outrider.decoding.sampling import Choices
from outrider.decoding.verification import Verdict, verify_matching, verify_rejection

EXACT = 1e-12
Prefix = tuple[int, ...]
Verifier = Callable[[Tensor, Tensor | None, list[int], Choices], Verdict]


@dataclass
class Scripted:
    """Chance that follows a script of decisions, then takes the first outcome; it notes the others."""

    script: list[int]
    weight: float = 1.0
    taken: list[int] = field(default_factory=list)
    open: list[int] = field(default_factory=list)

    def accept(self, probability: float) -> bool:
        assert 0 <= probability <= 1
        return bool(self._decide([(1, probability), (0, 1 - probability)]))

    def choose(self, weights: Tensor) -> int:
        assert (weights >= 0).all()
        assert weights.sum() > 0
        return self._decide(list(enumerate((weights / weights.sum()).tolist())))

    def _decide(self, outcomes: list[tuple[int, float]]) -> int:
        outcomes = [(value, probability) for value, probability in outcomes if probability > 0]
        step = len(self.taken)
        choice = self.script[step] if step < len(self.script) else 0
        self.taken.append(choice)
        self.open.append(len(outcomes))
        value, probability = outcomes[choice]
        self.weight *= probability
        return value


def outcomes(run: Callable[[Choices], Verdict]) -> Iterator[tuple[Verdict, float]]:
    """Yield every verdict that `run` can come to, with its probability, by replaying it once for each."""
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Scripted(scripts.pop())
        verdict = run(chance)
        for step in range(len(chance.script), len(chance.taken)):
            scripts += [[*chance.taken[:step], other] for other in range(1, chance.open[step])]
        yield verdict, chance.weight


class Tree:
    """A language in which every prefix has a law of its own."""

    def __init__(self, size: int, depth: int, make: Callable[[Prefix], Tensor]) -> None:
        self.size = size
        self.laws = {prefix: make(prefix) for n in range(depth + 1)
                     for prefix in itertools.product(range(size), repeat=n)}

    def __getitem__(self, prefix: Prefix) -> Tensor:
        return self.laws[prefix]

    def stack(self, proposal: Prefix, count: int) -> Tensor:
        """The laws after 0, 1, .. count - 1 tokens of `proposal`."""
        return torch.stack([self.laws[proposal[:n]] for n in range(count)])

    def probability(self, sequence: Prefix, start: int = 0) -> float:
        """Of `sequence`, given its first `start` tokens."""
        result = 1.0
        for n in range(start, len(sequence)):
            result *= float(self.laws[sequence[:n]][sequence[n]])
        return result


def random_law(size: int, generator: torch.Generator, sparse: float = 0.0) -> Tensor:
    weights = torch.rand(size, generator=generator, dtype=torch.float64) ** 3 + 1e-3
    keep = torch.rand(size, generator=generator) >= sparse
    keep[int(torch.randint(size, (), generator=generator))] = True  # at least one token stays possible
    weights = weights * keep
    return weights / weights.sum()


def one_hot(size: int, token: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)[token]


def pair(kind: str, size: int, depth: int, seed: int) -> tuple[Tree, Tree]:
    """A target and a draft of one of several kinds."""
    generator = torch.Generator().manual_seed(seed)

    def law(sparse: float = 0.0) -> Callable[[Prefix], Tensor]:
        return lambda _: random_law(size, generator, sparse)

    def hot(_: Prefix) -> Tensor:
        return one_hot(size, int(torch.randint(size, (), generator=generator)))

    half = size // 2

    def within(low: int, high: int) -> Callable[[Prefix], Tensor]:
        def make(_: Prefix) -> Tensor:
            full = torch.zeros(size, dtype=torch.float64)
            full[low:high] = random_law(high - low, generator)
            return full
        return make

    target = Tree(size, depth, {
        "random": law(), "sparse": law(0.5), "equal": law(), "nearly equal": law(), "one-hot target": hot,
        "one-hot draft": law(), "both one-hot": hot, "disjoint": within(0, half), "smaller draft": law(),
    }[kind])
    if kind == "equal":
        return target, target
    if kind == "nearly equal":
        def nudged(prefix: Prefix) -> Tensor:
            moved = target[prefix] + 1e-9 * random_law(size, generator)
            return moved / moved.sum()
        return target, Tree(size, depth, nudged)
    draft = Tree(size, depth, {
        "random": law(), "sparse": law(0.5), "one-hot target": law(), "one-hot draft": hot,
        "both one-hot": hot, "disjoint": within(half, size), "smaller draft": within(0, size - 1),
    }[kind])
    return target, draft


def emitted_law(verify: Verifier, target: Tree, draft: Tree | None, length: int,
                proposals: dict[Prefix, float]) -> dict[Prefix, float]:
    """Probability of each emitted sequence: `proposals` with their weights, through the verifier."""
    emitted: dict[Prefix, float] = {}
    for proposal, weight in proposals.items():
        laws = target.stack(proposal, length + 1)
        drafts = draft.stack(proposal, length) if draft is not None and length else None
        total = 0.0
        for verdict, probability in outcomes(lambda c: verify(laws, drafts, list(proposal), c)):  # noqa: B023
            sequence = (*proposal[:verdict.accepted], verdict.token)
            emitted[sequence] = emitted.get(sequence, 0.0) + weight * probability
            total += probability
        assert total == pytest.approx(1, abs=EXACT), "not every outcome was visited"
    return emitted


def greatest_error(target: Tree, emitted: dict[Prefix, float], length: int) -> float:
    """Greatest difference between the target's law of `length` + 1 tokens and `emitted` continued by it."""
    worst = 0.0
    for sequence in itertools.product(range(target.size), repeat=length + 1):
        joint = sum(emitted.get(sequence[:n], 0.0) * target.probability(sequence, n)
                    for n in range(1, length + 2))
        worst = max(worst, abs(joint - target.probability(sequence)))
    return worst


def drawn_from(draft: Tree, length: int) -> dict[Prefix, float]:
    """Every proposal the draft can make, with its probability."""
    every = itertools.product(range(draft.size), repeat=length)
    weights = {proposal: draft.probability(proposal) for proposal in every}
    return {proposal: weight for proposal, weight in weights.items() if weight > 0}


KINDS = ["random", "sparse", "equal", "nearly equal", "one-hot target", "one-hot draft", "both one-hot",
         "disjoint", "smaller draft"]
SHAPES = list(itertools.product((3, 4, 5), range(5)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "length"), SHAPES)
def test_rejection_sampling_keeps_the_targets_law(kind: str, size: int, length: int) -> None:
    target, draft = pair(kind, size, length + 1, seed=100 * size + length)
    proposals = drawn_from(draft, length)
    assert sum(proposals.values()) == pytest.approx(1, abs=EXACT)
    emitted = emitted_law(verify_rejection, target, draft, length, proposals)
    for token in range(size):
        first = sum(weight for sequence, weight in emitted.items() if sequence[0] == token)
        assert first == pytest.approx(float(target[()][token]), abs=EXACT)
    assert greatest_error(target, emitted, length) < EXACT


@pytest.mark.parametrize("kind", ["random", "sparse", "one-hot target"])
@pytest.mark.parametrize(("size", "length"), [shape for shape in SHAPES if shape[0]**shape[1] <= 81])
def test_determined_proposals_keep_the_targets_law(kind: str, size: int, length: int) -> None:
    """Whatever is proposed without chance: the law is kept for every single proposal."""
    target, _ = pair(kind, size, length + 1, seed=200 * size + length)
    for proposal in itertools.product(range(size), repeat=length):
        emitted = emitted_law(verify_rejection, target, None, length, {proposal: 1.0})
        assert greatest_error(target, emitted, length) < EXACT


def test_acceptance_is_the_best_there_can_be() -> None:
    """The first token stands with probability sum(min(p, q)), which no verifier can exceed."""
    target, draft = pair("random", 5, 2, seed=3)
    stands = 0.0
    for token in range(5):
        laws = target.stack((token,), 2)
        for verdict, probability in outcomes(
                lambda c: verify_rejection(laws, draft.stack((), 1), [token], c)):  # noqa: B023
            stands += float(draft[()][token]) * probability * (verdict.accepted == 1)
    assert stands == pytest.approx(float(torch.minimum(target[()], draft[()]).sum()), abs=EXACT)


def test_a_right_draft_is_always_believed() -> None:
    target, draft = pair("equal", 4, 4, seed=5)
    for proposal in drawn_from(draft, 3):
        run = outcomes(lambda c: verify_rejection(
            target.stack(proposal, 4), draft.stack(proposal, 3), list(proposal), c))  # noqa: B023
        assert all(verdict.accepted == 3 for verdict, _ in run)


@pytest.mark.parametrize("broken", [0.0, torch.nan])
@pytest.mark.parametrize("token", range(3))
def test_a_broken_draft_law_does_not_reach_the_output(broken: float, token: int) -> None:
    """A proposal whose own law says zero or NaN of it was not drawn from that law: it counts as determined.

    Weights that overflow make such laws, and a wrong draft may cost speed but never the target's law.
    """
    target, _ = pair("sparse", 3, 2, seed=11 + token)
    law = torch.full((3,), 0.5 if broken == 0 else torch.nan, dtype=torch.float64)
    law[token] = broken
    emitted: dict[Prefix, float] = {}
    laws = target.stack((token,), 2)
    for verdict, weight in outcomes(lambda c: verify_rejection(laws, law[None], [token], c)):
        sequence = (token, verdict.token) if verdict.accepted else (verdict.token,)
        emitted[sequence] = emitted.get(sequence, 0.0) + weight
    assert greatest_error(target, emitted, 1) < EXACT


def test_nothing_left_over_after_rounding() -> None:
    """Two laws that agree to the last bit where the target is larger leave an empty remainder."""
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[0.5, 0.5, 1e-17]], dtype=torch.float64)
    for verdict, _ in outcomes(lambda c: verify_rejection(p, q, [2], c)):
        assert verdict.accepted == 0
        assert verdict.token in (0, 1)


# The enumeration itself must be able to fail: rules that look right and are not.


def always_accepts(target: Tensor, draft: Tensor | None, proposal: list[int], chance: Choices) -> Verdict:
    return Verdict(len(proposal), chance.choose(target[len(proposal)]))


def draws_again_from_p(target: Tensor, draft: Tensor | None, proposal: list[int], chance: Choices) -> Verdict:
    assert draft is not None
    for index, token in enumerate(proposal):
        if not chance.accept(min(1.0, float(target[index, token] / draft[index, token]))):
            return Verdict(index, chance.choose(target[index]))
    return Verdict(len(proposal), chance.choose(target[len(proposal)]))


def repeats_first_law(target: Tensor, draft: Tensor | None, proposal: list[int], chance: Choices) -> Verdict:
    verdict = verify_rejection(target, draft, proposal, chance)
    if verdict.accepted < len(proposal):
        return verdict
    return Verdict(len(proposal), chance.choose(target[0]))


@pytest.mark.parametrize("wrong", [always_accepts, draws_again_from_p, repeats_first_law])
def test_the_enumeration_notices_a_wrong_rule(wrong: Verifier) -> None:
    target, draft = pair("random", 3, 3, seed=1)
    emitted = emitted_law(wrong, target, draft, 2, drawn_from(draft, 2))
    assert greatest_error(target, emitted, 2) > 1e-3


# Matching


@pytest.mark.parametrize("length", range(5))
def test_matching_over_all_sequences(length: int) -> None:
    """Every proposal against every row of choices: the longest agreement stands, then the target's own."""
    for chosen in itertools.product(range(3), repeat=length + 1):
        for proposal in itertools.product(range(3), repeat=length):
            agree = next((n for n in range(length) if proposal[n] != chosen[n]), length)
            assert verify_matching(chosen, proposal) == Verdict(agree, chosen[agree])


@pytest.mark.parametrize("length", range(5))
def test_matching_emits_what_a_deterministic_target_says(length: int) -> None:
    """The target's choice depends on the prefix; whatever is proposed, its own path comes out."""
    generator = torch.Generator().manual_seed(length)
    says = {prefix: int(torch.randint(3, (), generator=generator))
            for n in range(length + 1) for prefix in itertools.product(range(3), repeat=n)}
    path: Prefix = ()
    for _ in range(length + 1):
        path = (*path, says[path])
    accepted = set()
    for proposal in itertools.product(range(3), repeat=length):
        verdict = verify_matching([says[proposal[:n]] for n in range(length + 1)], proposal)
        emitted = (*proposal[:verdict.accepted], verdict.token)
        assert emitted == path[:len(emitted)]
        accepted.add(verdict.accepted)
    assert accepted == set(range(length + 1))
