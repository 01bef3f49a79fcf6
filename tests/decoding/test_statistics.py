"""Counts of rounds, checked over every sequence of a few rounds."""

from __future__ import annotations

import itertools
import json

import pytest

from outrider.decoding import Statistics

#: Every (drafted, accepted) with up to three drafted tokens.
ROUNDS = [(drafted, accepted) for drafted in range(4) for accepted in range(drafted + 1)]


def statistics_of(rounds: tuple[tuple[int, int], ...]) -> Statistics:
    statistics = Statistics()
    for drafted, accepted in rounds:
        statistics.record_round(drafted, accepted)
        statistics.generated += accepted + 1
    return statistics


SEQUENCES = [rounds for n in range(4) for rounds in itertools.product(ROUNDS, repeat=n)]


def test_counts_over_every_sequence_of_rounds() -> None:
    for rounds in SEQUENCES:
        statistics = statistics_of(rounds)
        assert statistics.target_passes == len(rounds)
        assert statistics.drafted == sum(drafted for drafted, _ in rounds)
        assert statistics.accepted == sum(accepted for _, accepted in rounds)
        assert statistics.accepted <= statistics.evaluated <= statistics.drafted
        assert statistics.zero_accept_rounds == sum(d > 0 and a == 0 for d, a in rounds)
        assert sum(statistics.widths.values()) == len(rounds)
        assert sum(width * times for width, times in statistics.widths.items()) == statistics.drafted
        assert statistics.evaluated == sum(statistics.evaluated_per_position)
        assert statistics.accepted == sum(statistics.accepted_per_position)


def test_places_over_every_sequence_of_rounds() -> None:
    """Place i had its say where i tokens before it stood, and stood where more than i did."""
    for rounds in SEQUENCES:
        statistics = statistics_of(rounds)
        places = max((drafted for drafted, _ in rounds), default=0)
        evaluated = [sum(d > place and a >= place for d, a in rounds) for place in range(places)]
        while evaluated and evaluated[-1] == 0:
            evaluated.pop()  # places that nobody reached are not listed
        accepted = [sum(a > place for _, a in rounds) for place in range(len(evaluated))]
        assert statistics.evaluated_per_position == evaluated
        assert statistics.accepted_per_position == accepted
        assert statistics.acceptance_per_position == [a / e for a, e in zip(accepted, evaluated, strict=True)]


def test_rates_are_the_fields_definitions() -> None:
    statistics = statistics_of(((3, 3), (3, 1), (2, 0), (0, 0)))
    assert statistics.acceptance_rate == 4 / 8             # accepted / drafted
    assert statistics.mean_accepted_length == 8 / 4        # tokens per target pass, bonus included
    statistics.prefill_seconds, statistics.total_seconds = 1.0, 5.0
    assert statistics.tokens_per_second == 8 / 4           # the prompt's pass is not counted
    assert Statistics().acceptance_rate is None
    assert Statistics().mean_accepted_length is None
    assert statistics_of(((0, 0),)).acceptance_rate is None
    assert statistics_of(((0, 0),)).mean_accepted_length == 1


def test_adding_is_the_same_as_one_long_request() -> None:
    some = list(itertools.product(ROUNDS, repeat=2))
    for first, second in itertools.product(some[::3], some[::5]):
        added = statistics_of(first)
        added.add(statistics_of(second))
        assert added == statistics_of((*first, *second))


def test_adding_leaves_the_other_as_it_was() -> None:
    total, part = Statistics(), statistics_of(((3, 2),))
    part.draft_seconds, part.total_seconds = 0.25, 1.5
    total.add(part)
    total.add(part)
    assert part.widths == {3: 1}
    assert part.evaluated_per_position == [1, 1, 1]
    assert (total.widths, total.draft_seconds, total.total_seconds) == ({3: 2}, 0.5, 3.0)


@pytest.mark.parametrize("rounds", [(), ((0, 0),), ((3, 2), (10, 0), (2, 2))])
def test_dump_is_json_with_every_count_and_rate(rounds: tuple[tuple[int, int], ...]) -> None:
    statistics = statistics_of(rounds)
    dumped = statistics.dump()
    assert json.loads(json.dumps(dumped, allow_nan=False)) == dumped
    assert set(vars(statistics)) <= set(dumped)
    for rate in ("acceptance_rate", "mean_accepted_length", "acceptance_per_position", "tokens_per_second"):
        assert dumped[rate] == getattr(statistics, rate)
    assert list(dumped["widths"]) == [str(width) for width in sorted(statistics.widths)]
