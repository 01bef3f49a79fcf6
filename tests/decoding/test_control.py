"""The controller, fed scripted costs and acceptance: no clock anywhere."""

from __future__ import annotations

import itertools
import random

import pytest

from outrider.decoding.control import MAX_WIDTH, AdaptiveWidth, CostModel, FixedWidth, Round
from outrider.errors import DecodingError

Costs = dict[int, float]


def target_costs(first: float, each: float) -> Costs:
    """Seconds of a pass over n tokens."""
    return {n: first + each * (n - 1) for n in range(1, MAX_WIDTH + 2)}


def rate(width: int, acceptance: list[float], target: Costs, draft: float) -> float:
    """Expected tokens per second, written out once more from the definition."""
    tokens = 1.0
    for last in range(1, width + 1):
        product = 1.0
        for place in range(last):
            product *= acceptance[place]
        tokens += product
    return tokens / (target[width + 1] + width * draft)


def best_width(acceptance: list[float], target: Costs, draft: float) -> int:
    return max(range(len(acceptance) + 1), key=lambda width: rate(width, acceptance, target, draft))


def teach(controller: AdaptiveWidth, width: int, accepted: int, target: Costs, draft: float) -> None:
    controller.observe(Round(width, accepted, width * draft, target[width + 1]))


def controller_with(target: Costs, draft: float, max_width: int = 8) -> AdaptiveWidth:
    return AdaptiveWidth(CostModel(dict(target), draft), max_width)


# Fixed


@pytest.mark.parametrize("width", range(MAX_WIDTH + 1))
def test_a_fixed_width_stays(width: int) -> None:
    controller = FixedWidth(width)
    controller.observe(Round(width, 0, 9.0, 9.0))
    assert controller.width() == width


@pytest.mark.parametrize("width", [-1, MAX_WIDTH + 1, 1_000])
def test_a_width_out_of_range(width: int) -> None:
    with pytest.raises(DecodingError, match=rf"from 0 to {MAX_WIDTH}, not {width}"):
        FixedWidth(width)


# Adaptive: the optimum


PRICES = [(target_costs(1.0, each), draft)
          for each in (0.0, 0.05, 0.4, 1.0) for draft in (0.0, 0.05, 0.3, 1.2)]


@pytest.mark.parametrize("right", range(9))
@pytest.mark.parametrize(("target", "draft"), PRICES)
def test_takes_the_optimum_when_acceptance_is_certain(right: int, target: Costs, draft: float) -> None:
    """The first `right` places always stand and the next never; every width is tried for the optimum."""
    acceptance = [1.0] * right + [0.0] * (8 - right)
    controller = controller_with(target, draft)
    for _ in range(2_000):
        teach(controller, 8, right, target, draft)
    chosen = controller.width()
    # What is known of an acceptance after so many rounds is still a few percent short of certain.
    assert rate(chosen, acceptance, target, draft) >= 0.97 * max(
        rate(width, acceptance, target, draft) for width in range(9))
    if draft > 0 and target[2] > target[1]:
        assert chosen <= right, "a place that never stands is never worth its price"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("target", "draft"), PRICES)
def test_takes_the_optimum_of_random_acceptance(seed: int, target: Costs, draft: float) -> None:
    """Rounds drawn from a known law; the width taken is as good as the best within the noise of 50 rounds."""
    chance = random.Random(seed)
    acceptance = sorted((chance.uniform(0.2, 0.98) for _ in range(8)), reverse=True)
    controller = controller_with(target, draft)
    for _ in range(3_000):
        accepted = 0
        while accepted < 8 and chance.random() < acceptance[accepted]:
            accepted += 1
        teach(controller, 8, accepted, target, draft)
    chosen, best = controller.width(), best_width(acceptance, target, draft)
    assert rate(chosen, acceptance, target, draft) >= 0.85 * rate(best, acceptance, target, draft)


def test_expected_rate_is_the_definition() -> None:
    target, draft = target_costs(1.0, 0.1), 0.2
    controller = controller_with(target, draft)
    for accepted in (0, 3, 1, 8, 2, 5):
        teach(controller, 8, accepted, target, draft)
    for width in range(9):
        expected = rate(width, controller.acceptance(), target, draft)
        assert controller.tokens_per_second(width) == pytest.approx(expected, rel=1e-9)


def test_acceptance_tends_to_what_is_seen() -> None:
    controller = controller_with(target_costs(1.0, 0.1), 0.1)
    for index in range(5_000):
        teach(controller, 3, (0, 1, 3, 3)[index % 4], target_costs(1.0, 0.1), 0.1)
    # Place 1 stands in 3 of 4 rounds, place 2 in 2 of those 3, place 3 in both of those that get so far.
    # Fifty rounds are remembered, and two more of prior belief lean on them.
    assert controller.acceptance()[:3] == pytest.approx([3 / 4, 2 / 3, 1], abs=0.03)


def test_the_unknown_place_is_believed_like_the_one_before() -> None:
    controller = controller_with(target_costs(1.0, 0.1), 0.1)
    for _ in range(500):
        teach(controller, 2, 2, target_costs(1.0, 0.1), 0.1)
    acceptance = controller.acceptance()
    assert acceptance[2:] == [acceptance[1]] * 6


@pytest.mark.parametrize("max_width", [1, 2, 3, 8, 16, 40])
def test_never_more_than_the_greatest_width(max_width: int) -> None:
    free = dict.fromkeys(range(1, 50), 1.0)
    controller = controller_with(free, 0.0, max_width)
    for _ in range(200):
        width = controller.width()
        assert width <= min(max_width, MAX_WIDTH)
        teach(controller, width, width, free, 0.0)
    assert controller.width() == min(max_width, MAX_WIDTH), "drafting is free and always right"


# Censoring


@pytest.mark.parametrize("accepted", range(9))
def test_places_behind_a_rejection_are_not_counted(accepted: int) -> None:
    """The target had no say on them; counting them as failures would make later places look bad."""
    target = target_costs(1.0, 0.1)
    controller = controller_with(target, 0.1)
    for _ in range(100):
        teach(controller, 8, 8, target, 0.1)
    before = controller.acceptance()
    for _ in range(10):
        teach(controller, 8, accepted, target, 0.1)
    after = controller.acceptance()
    # Evidence on the places that were judged grew or fell; the judged failure is place `accepted` alone.
    assert all(new >= old - 1e-12 for new, old in zip(after[:accepted], before[:accepted], strict=True))
    if accepted < 8:
        assert after[accepted] < before[accepted] - 0.05
    # Later places keep their own evidence; only their lean on the place before, of weight 2 in 50, moves.
    assert all(new > old - 0.02 for new, old in zip(after[accepted + 1:], before[accepted + 1:], strict=True))


# Zero, probing, recovery


def run(controller: AdaptiveWidth, rounds: int, right: int, target: Costs, draft: float) -> list[int]:
    """Let it choose; every proposal stands in its first `right` places. Returns the widths it took."""
    widths = []
    for _ in range(rounds):
        width = controller.width()
        teach(controller, width, min(width, right), target, draft)
        widths.append(width)
    return widths


def gaps(widths: list[int]) -> list[int]:
    """Numbers of idle rounds between rounds that drafted, the first run of them left out."""
    drafted = [index for index, width in enumerate(widths) if width]
    return [b - a - 1 for a, b in itertools.pairwise(drafted) if b - a > 1]


def test_stops_when_nothing_stands_and_probes_ever_more_rarely() -> None:
    target, draft = target_costs(1.0, 0.1), 0.2
    controller = controller_with(target, draft)
    widths = run(controller, 3_000, 0, target, draft)
    idle = gaps(widths)
    assert idle[:4] == sorted(idle[:4])
    assert idle[0] < idle[3], "the intervals grow"
    assert idle[-1] == max(idle), "and stay long"
    assert len(set(idle[-3:])) == 1, "but do not grow for ever"
    assert sum(width > 0 for width in widths[1_000:]) <= 2_000 / 100
    assert max(widths[1_000:]) <= 2, "a probe is short"


@pytest.mark.parametrize(("target", "draft"), [
    (target_costs(1.0, 0.1), 1.5),    # a draft step dearer than the target's pass
    (target_costs(1.0, 1.0), 0.05),   # every further token costs the target a whole pass
])
def test_stops_when_drafting_cannot_pay_although_all_stands(target: Costs, draft: float) -> None:
    controller = controller_with(target, draft)
    widths = run(controller, 2_000, 8, target, draft)
    assert set(widths[:8]) == {0}
    assert sum(width > 0 for width in widths) < 2_000 / 30
    assert widths[-1] == 0 or max(widths) <= 2


def test_idle_rounds_cost_nothing_but_the_target() -> None:
    """Never slower: over a long hopeless request the loss to probing is below two percent."""
    target, draft = target_costs(1.0, 0.1), 0.2
    widths = run(controller_with(target, draft), 5_000, 0, target, draft)
    spent = sum(target[width + 1] + width * draft for width in widths)
    assert spent < 1.02 * len(widths) * target[1]


def test_recovers_when_acceptance_becomes_good() -> None:
    target, draft = target_costs(1.0, 0.05), 0.1
    controller = controller_with(target, draft)
    run(controller, 300, 0, target, draft)
    assert controller.tokens_per_second(0) == max(controller.tokens_per_second(width) for width in range(9))
    later = run(controller, 3_000, 8, target, draft)
    assert later[-1] == 8
    first = later.index(8)
    assert set(later[first + 200:]) == {8}


def test_intervals_start_anew_after_a_good_time() -> None:
    target, draft = target_costs(1.0, 0.05), 0.1
    controller = controller_with(target, draft)
    run(controller, 2_000, 0, target, draft)
    run(controller, 3_000, 8, target, draft)
    assert gaps(run(controller, 400, 0, target, draft))[0] < 20


def test_reacts_when_a_good_draft_turns_bad() -> None:
    target, draft = target_costs(1.0, 0.05), 0.1
    controller = controller_with(target, draft)
    run(controller, 500, 8, target, draft)
    widths = run(controller, 400, 0, target, draft)
    assert sum(width > 0 for width in widths[200:]) < 20


# Costs


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = CostModel({1: 1.0, 3: 2.0, 7: 4.0})
    assert [costs.target_seconds(n) for n in range(1, 8)] == pytest.approx([1, 1.5, 2, 2.5, 3, 3.5, 4])
    assert costs.target_seconds(20) == 4.0
    assert CostModel({4: 2.0}).target_seconds(1) == 2.0
    assert CostModel().target_seconds(3) == 0.0


def test_costs_follow_measurement_slowly() -> None:
    costs = CostModel({5: 1.0}, draft=0.1, smoothing=0.1)
    costs.observe(Round(4, 0, 0.8, 2.0))
    assert costs.target[5] == pytest.approx(1.1)
    assert costs.draft == pytest.approx(0.11)
    for _ in range(200):
        costs.observe(Round(4, 0, 0.8, 2.0))
    assert costs.target[5] == pytest.approx(2.0, rel=1e-3)
    assert costs.draft == pytest.approx(0.2, rel=1e-3)


def test_a_pause_of_the_machine_counts_as_three_times_the_usual() -> None:
    costs = CostModel({5: 1.0}, draft=0.1, smoothing=0.1)
    costs.observe(Round(4, 0, 400.0, 1_000.0))
    assert costs.target[5] == pytest.approx(1.2)
    assert costs.draft == pytest.approx(0.12)


def test_the_first_measurement_is_taken_whole() -> None:
    costs = CostModel()
    costs.observe(Round(2, 1, 0.4, 3.0))
    assert costs.target == {3: 3.0}
    assert costs.draft == pytest.approx(0.2)


def test_a_round_without_a_draft_says_nothing_of_its_cost() -> None:
    costs = CostModel({1: 1.0}, draft=0.1)
    costs.observe(Round(0, 0, 0.5, 1.0))
    assert costs.draft == 0.1


def test_a_draft_that_had_to_catch_up_does_not_change_its_cost() -> None:
    target = target_costs(1.0, 0.1)
    controller = controller_with(target, 0.1)
    controller.observe(Round(0, 0, 0.0, 1.0))
    controller.observe(Round(2, 2, 50.0, 1.2))  # catching up with what was skipped took long
    assert controller.costs.draft == 0.1
    assert controller.acceptance()[0] > AdaptiveWidth.PRIOR, "what it guessed still counts"
    controller.observe(Round(2, 2, 0.4, 1.2))   # now it is current
    assert controller.costs.draft == pytest.approx(0.1 + controller.costs.smoothing * 0.1)
