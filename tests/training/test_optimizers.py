"""Optimisers against torch's own, and the learning rate against its formula, at every step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from outrider.model import Llama
from outrider.recipe import OptimizerSection, ScheduleSection
from outrider.training.optimizers import Optimizers, build_optimizer, learning_rate
from tests.conftest import tiny_model

PEAK = 6e-4
CPU = torch.device("cpu")


def rates(steps: int, **section: object) -> list[float]:
    schedule = ScheduleSection.model_validate(section)
    return [learning_rate(step, steps, PEAK, schedule) for step in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [1, 2, 7, 30])
def test_warm_up_is_a_straight_line_to_the_peak(kind: str, warmup: int) -> None:
    found = rates(100, kind=kind, warmup=warmup)
    assert found[:warmup] == pytest.approx([PEAK * (step + 1) / warmup for step in range(warmup)])
    assert found[warmup - 1] == PEAK
    assert max(found) == PEAK


@pytest.mark.parametrize(("steps", "warmup"), [
    (steps, warmup) for steps in (1, 2, 10, 101) for warmup in (0, 1, 5) if warmup < steps])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_cosine_follows_its_formula(steps: int, warmup: int, final: float) -> None:
    found = rates(steps, kind="cosine", warmup=warmup, final=final)
    length = steps - warmup
    expected = [PEAK * (final + (1 - final) * (1 + math.cos(math.pi * n / length)) / 2)
                for n in range(1, length + 1)]
    assert found[warmup:] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert found[-1] == pytest.approx(PEAK * final, abs=1e-18)
    assert all(a >= b for a, b in itertools.pairwise(found[warmup:]))


@pytest.mark.parametrize(("steps", "warmup", "final", "decay"),
                         list(itertools.product([10, 101], [0, 1, 5], [0.0, 0.1, 1.0], [0.01, 0.2, 0.5])))
def test_wsd_is_stable_then_falls_in_a_line(steps: int, warmup: int, final: float, decay: float) -> None:
    found = rates(steps, kind="wsd", warmup=warmup, final=final, decay=decay)
    length = max(1, round(steps * decay))
    assert found[warmup:steps - length] == [PEAK] * (steps - length - warmup)
    expected = [PEAK * (1 - (1 - final) * n / length) for n in range(1, length + 1)]
    assert found[steps - length:] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    assert found[-1] == pytest.approx(PEAK * final, abs=1e-18)


def test_constant_stays() -> None:
    assert rates(50, kind="constant", warmup=0) == [PEAK] * 50
    assert rates(50, kind="constant", warmup=9)[9:] == [PEAK] * 41


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [3, 4, 1_000])
def test_a_run_shorter_than_its_warm_up_still_reaches_the_peak(kind: str, warmup: int) -> None:
    assert rates(3, kind=kind, warmup=warmup) == pytest.approx([PEAK / 3, 2 * PEAK / 3, PEAK])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_rates_are_always_within_bounds(kind: str) -> None:
    """Also where warm-up and decay overlap."""
    for steps, warmup, decay in itertools.product([1, 2, 5, 20], [0, 1, 4, 19, 50], [0.01, 0.5, 1.0]):
        found = rates(steps, kind=kind, warmup=warmup, decay=decay, final=0.1)
        lowest = min(0.1, 1 / max(1, min(warmup, steps)))
        assert all(lowest * PEAK * (1 - 1e-12) <= rate <= PEAK for rate in found), (steps, warmup, decay)


def model(tied: bool = False) -> Llama:
    return tiny_model(3, tie_word_embeddings=tied).requires_grad_(True)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(kind: str, tied: bool) -> None:
    network = model(tied)
    optimizer = build_optimizer(network, OptimizerSection(kind=kind, weight_decay=0.3), CPU)  # type: ignore[arg-type]
    decay = [(id(p), group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(decay) == len(set(decay))
    assert dict(decay) == {id(p): 0.3 if p.dim() == 2 else 0.0 for p in network.parameters()}


def test_muon_takes_the_matrices_inside_the_blocks_and_adamw_the_rest() -> None:
    network = model()
    optimizer = build_optimizer(network, OptimizerSection(kind="muon"), CPU)
    names = {id(p): name for name, p in network.named_parameters()}
    taken = {type(member).__name__: {names[id(p)] for group in member.param_groups for p in group["params"]}
             for member in optimizer.members}
    blocks = {f"layers.{layer}.{part}.weight" for layer in range(2)
              for part in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")}
    assert taken == {"Muon": blocks, "AdamW": set(names.values()) - blocks}


def test_settings_reach_the_optimiser() -> None:
    section = OptimizerSection(lr=0.5, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.25)
    for group in build_optimizer(model(), section, CPU).param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.5, (0.7, 0.8), 1e-3)


def gradients(network: Llama, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) * 0.01 for p in network.parameters()]


def take_steps(network: Llama, optimizers: Sequence[torch.optim.Optimizer | Optimizers],
               steps: int = 4) -> None:
    for step in range(steps):
        for parameter, gradient in zip(network.parameters(), gradients(network, step), strict=True):
            parameter.grad = gradient
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_updates_equal_torchs_own_optimisers(kind: str) -> None:
    ours, theirs = model(), model()
    section = OptimizerSection(kind=kind, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)  # type: ignore[arg-type]
    take_steps(ours, [build_optimizer(ours, section, CPU)])
    inner = [p for name, p in theirs.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    outer = [p for name, p in theirs.named_parameters() if not name.startswith("layers.") and p.dim() == 2]
    gains = [p for p in theirs.parameters() if p.dim() == 1]
    others: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        [{"params": outer if kind == "muon" else outer + inner, "weight_decay": 0.2},
         {"params": gains, "weight_decay": 0.0}], lr=1e-2, betas=(0.8, 0.9), eps=1e-6)]
    if kind == "muon":
        others.append(torch.optim.Muon(inner, lr=1e-2, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"))
    take_steps(theirs, others)
    start = dict(model().named_parameters())
    for (name, found), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert not torch.equal(found, start[name]), name
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_zero_grad_drops_every_gradient() -> None:
    network = model()
    optimizer = build_optimizer(network, OptimizerSection(kind="muon"), CPU)
    take_steps(network, [optimizer], 1)
    assert all(p.grad is not None for p in network.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in network.parameters())
    assert optimizer.state.keys() == set(network.parameters())
