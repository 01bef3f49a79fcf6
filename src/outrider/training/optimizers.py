"""Optimisers and the learning rate over time."""

from __future__ import annotations

import math

import torch
from torch import nn

from outrider.recipe import OptimizerSection, ScheduleSection


def build_optimizer(model: nn.Module, section: OptimizerSection, device: torch.device) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only (norm gains are left free), fused where PyTorch can."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": section.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps,
                             fused=device.type in ("cpu", "cuda", "mps"))


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
