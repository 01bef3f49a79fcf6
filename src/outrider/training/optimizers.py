"""Optimisers and the learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from outrider.recipe import OptimizerSection, ScheduleSection


class Optimizers:
    """One optimiser or several, each over its own parameters, stepped as one."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        self.members = list(members)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all members."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """State by parameter."""
        return {parameter: state for member in self.members for parameter, state in member.state.items()}

    def step(self) -> None:
        """Update every parameter from its gradient."""
        for member in self.members:
            member.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)


def build_optimizer(model: nn.Module, section: OptimizerSection, device: torch.device) -> Optimizers:
    """Return the recipe's optimiser for `model`.

    `adamw`: weight decay on matrices only, norm gains left free; fused where PyTorch can.
    `muon` (Jordan et al. 2024): momentum orthogonalised by Newton-Schulz for the matrices inside the blocks,
    scaled to AdamW's update size so that one learning rate fits both (Liu et al. 2025, Moonlight); AdamW for
    embedding, head and norms.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if p.dim() == 2 and name.startswith("layers.")] if section.kind == "muon" else []
    taken = {id(p) for p in inner}
    rest = [p for _, p in named if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    members: list[torch.optim.Optimizer] = [torch.optim.AdamW(
        groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=device.type in ("cpu", "cuda", "mps"))]
    if inner:
        members.append(torch.optim.Muon(inner, lr=section.lr, weight_decay=section.weight_decay,
                                        adjust_lr_fn="match_rms_adamw"))
    return Optimizers(members)


def learning_rate(step: int, steps: int, peak: float, section: ScheduleSection) -> float:
    """Return the learning rate of step `step` (from 0) of `steps`.

    Linear warm-up for `warmup` steps; then a cosine to `final x peak`, or (wsd) the peak until the last
    `decay` share of the steps and a straight line to `final x peak` (Hu et al. 2024, MiniCPM).
    """
    warmup = min(section.warmup, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if section.kind == "constant":
        return peak
    decay_steps = steps - warmup if section.kind == "cosine" else max(1, round(steps * section.decay))
    progress = min(1.0, max(0.0, (step - (steps - decay_steps) + 1) / decay_steps))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if section.kind == "cosine" else 1 - progress
    return peak * (section.final + (1 - section.final) * shape)
