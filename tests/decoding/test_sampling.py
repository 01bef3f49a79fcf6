"""From logits to laws as transformers makes them, and from laws to tokens as they say."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from outrider.decoding import Sampling
from outrider.decoding.sampling import SeededChoices, SharedNoise, probabilities
from outrider.errors import DecodingError

#: Chance of a chi-square test failing although all is well, had the seed been drawn; the seeds are fixed.
FALSE_ALARM = 1e-6


def chi_square_p(counts: Tensor, law: Tensor) -> float:
    """Probability of counts at least as far from `law`; cells expected fewer than 5 times are merged."""
    assert not counts[law == 0].any(), "an impossible outcome occurred"
    expected = law.double() * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0  # a law without chance, and nothing impossible occurred
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def count(draw: Callable[[int], int], size: int, times: int) -> Tensor:
    return torch.bincount(torch.tensor([int(draw(index)) for index in range(times)]), minlength=size)


def some_law(size: int = 12, seed: int = 0) -> Tensor:
    """Uneven, with zeros at both ends and inside."""
    law = torch.rand(size, generator=torch.Generator().manual_seed(seed)) ** 2 + 0.01
    law[[0, 5, size - 1]] = 0
    return law / law.sum()


# Laws


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), list(itertools.product(
    (0.1, 0.7, 1.0, 1.8), (0, 1, 5, 50, 1_000), (0.05, 0.5, 0.9, 0.95, 1.0))))
def test_laws_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = 3 * torch.randn(20, 80, generator=torch.Generator().manual_seed(1))
    scores: Any = logits
    ids: Any = torch.zeros((20, 1), dtype=torch.long)
    scores = TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(ids, scores)
    expected = scores.softmax(-1)
    law = probabilities(logits, Sampling(temperature, top_k, top_p))
    assert torch.equal(law > 0, expected > 0)
    torch.testing.assert_close(law, expected, rtol=1e-5, atol=1e-7)


def test_laws_of_bfloat16_logits_are_computed_in_float32() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2)).bfloat16()
    law = probabilities(logits, Sampling(0.7))
    assert law.dtype == torch.float32
    torch.testing.assert_close(law, (logits.float() / 0.7).softmax(-1))


def test_ties_at_the_kth_place_are_all_kept() -> None:
    law = probabilities(torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]), Sampling(1.0, top_k=2))
    assert (law > 0).tolist() == [[False, True, True, True, True, False]]


def test_top_p_keeps_the_token_that_reaches_it() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    for top_p, kept in ((0.01, 1), (0.45, 1), (0.55, 2), (0.7, 2), (0.8, 3), (0.95, 4), (1.0, 4)):
        law = probabilities(logits, Sampling(1.0, top_p=top_p))
        assert int((law > 0).sum()) == kept
        assert float(law.sum()) == pytest.approx(1)


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-37, 1e-40, 1e-300])
def test_low_temperatures_tend_to_greedy(temperature: float) -> None:
    """A law has no NaN at any temperature that is accepted: dividing by a tiny one must not overflow."""
    try:
        sampling = Sampling(temperature)
    except DecodingError:
        return  # refusing it is as good
    law = probabilities(torch.tensor([[5.0, 7.0, -3.0], [-900.0, -901.0, -950.0]]), sampling)
    assert law.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("values", [
    {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1},
    {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": -0.5}, {"top_p": float("nan")},
])
def test_values_without_a_meaning_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(DecodingError, match=next(iter(values)).replace("_", ".")) as caught:
        Sampling(**values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_greedy_is_temperature_zero() -> None:
    assert Sampling().greedy
    assert not Sampling(0.01).greedy


# Tokens


def test_choose_follows_the_law() -> None:
    law, choices = some_law(), SeededChoices(3)
    assert chi_square_p(count(lambda _: choices.choose(law), 12, 20_000), law) > FALSE_ALARM


def test_choose_takes_weights_that_do_not_sum_to_one() -> None:
    law, choices = some_law(), SeededChoices(4)
    assert chi_square_p(count(lambda _: choices.choose(0.001 * law), 12, 20_000), law) > FALSE_ALARM


def test_the_test_of_laws_notices_another_law() -> None:
    """One token in fifty moved is seen, so a wrong law would not pass."""
    law, choices = some_law(), SeededChoices(3)
    other = law.clone()
    other[1], other[2] = law[1] - 0.02, law[2] + 0.02
    assert other.min() >= 0
    assert chi_square_p(count(lambda _: choices.choose(other), 12, 20_000), law) < FALSE_ALARM


@pytest.mark.parametrize("size", [1, 2, 7, 1_000])
def test_choose_never_takes_a_weight_of_zero(size: int) -> None:
    """Every place a single positive weight can have, and where chance falls exactly on a border."""
    for place in range(0, size, max(1, size // 20)):
        weights = torch.zeros(size)
        weights[place] = 1e-30
        assert SeededChoices(place).choose(weights) == place


@pytest.mark.parametrize("point", [0.0, 0.5, 1.0 - 2**-53])
def test_choose_on_the_borders(monkeypatch: pytest.MonkeyPatch, point: float) -> None:
    """The generator's least and greatest numbers, and one on a step of the cumulative sum."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(point, dtype=torch.float64))
    weights = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    assert SeededChoices(0).choose(weights) == (1 if point == 0 else 4)
    tenths = torch.full((10,), 0.1)  # whose float sum is not exactly 1
    assert 0 <= SeededChoices(0).choose(torch.cat([tenths, torch.zeros(3)])) < 10


def test_accept_has_the_probability_given() -> None:
    choices = SeededChoices(5)
    for probability in (0.0, 0.03, 0.5, 0.999, 1.0):
        law = torch.tensor([1 - probability, probability], dtype=torch.float64)
        assert chi_square_p(count(lambda _: choices.accept(probability), 2, 5_000), law) > FALSE_ALARM  # noqa: B023


def test_a_seed_repeats_and_seeds_differ() -> None:
    def draws(seed: int) -> list[int]:
        choices = SeededChoices(seed)
        return [choices.choose(torch.ones(1_000)) for _ in range(8)]

    assert draws(7) == draws(7)
    assert len({tuple(draws(seed)) for seed in range(8)}) == 8


@pytest.mark.parametrize("kind", [SeededChoices, SharedNoise])
@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 10**30])
def test_any_whole_number_is_a_seed_or_is_refused(kind: type, seed: int) -> None:
    """A person may type any number after --seed; a traceback is no answer."""
    with contextlib.suppress(DecodingError):
        kind(Sampling(1.0, seed=seed).seed)


# Shared noise


def test_shared_noise_follows_the_law_over_positions() -> None:
    law, noise = some_law(), SharedNoise(6)
    assert chi_square_p(count(lambda position: noise.pick(law, position), 12, 10_000), law) > FALSE_ALARM


def test_shared_noise_follows_the_law_over_seeds() -> None:
    law = some_law()
    assert chi_square_p(count(lambda seed: SharedNoise(seed).pick(law, 3), 12, 10_000), law) > FALSE_ALARM


def test_neighbouring_positions_are_independent() -> None:
    """Pairs of picks follow the product of the laws, along positions and along seeds."""
    law = some_law(6)
    product = torch.outer(law, law).flatten()
    noise = SharedNoise(8)
    along = count(lambda p: 6 * noise.pick(law, 2 * p) + noise.pick(law, 2 * p + 1), 36, 6_000)
    assert chi_square_p(along, product) > FALSE_ALARM
    across = count(
        lambda s: 6 * SharedNoise(2 * s).pick(law, 3) + SharedNoise(2 * s + 1).pick(law, 3), 36, 5_000)
    assert chi_square_p(across, product) > FALSE_ALARM


def test_a_pick_depends_on_seed_and_position_alone() -> None:
    """Not on the order of asking, what was asked before, how often, or by whom."""
    law, other = some_law(), some_law(seed=9)
    expected = [SharedNoise(11).pick(law, position) for position in range(200)]
    noise = SharedNoise(11)
    for position in [*range(199, -1, -3), *range(200), *range(0, 200, 7)]:
        noise.pick(other, position)
        assert noise.pick(law, position) == expected[position]
    assert expected != [SharedNoise(12).pick(law, position) for position in range(200)]


@pytest.mark.parametrize(("small", "large"), [(5, 12), (4_000, 4_100), (4_096, 4_097), (4_100, 9_000)])
def test_a_smaller_vocabulary_shares_the_noise_of_its_ids(small: int, large: int) -> None:
    """The pick is the same for a law with or without ids it gives nothing, whichever is asked first."""
    law = torch.rand(small, generator=torch.Generator().manual_seed(small))
    padded = torch.cat([law, torch.zeros(large - small)])
    for position in range(30):
        picks = [SharedNoise(13).pick(law, position), SharedNoise(13).pick(padded, position)]
        first_small, first_large = SharedNoise(13), SharedNoise(13)
        picks += [first_small.pick(law, position), first_small.pick(padded, position)]
        picks += [first_large.pick(padded, position), first_large.pick(law, position)]
        assert len(set(picks)) == 1


def test_shared_noise_makes_like_laws_agree() -> None:
    """Picks agree with probability (1 - d) / (1 + d) or more, d the total variation (Daliri et al. 2024)."""
    p, q = some_law(), some_law(seed=4)
    mixed = 0.8 * p + 0.2 * q
    distance = float((p - mixed).abs().sum()) / 2
    noise, other = SharedNoise(14), SharedNoise(14)
    agree = sum(noise.pick(p, position) == other.pick(mixed, position) for position in range(5_000)) / 5_000
    # Five standard deviations of the count below the bound: by chance once in three million.
    assert agree > (1 - distance) / (1 + distance) - 5 * (0.25 / 5_000) ** 0.5
