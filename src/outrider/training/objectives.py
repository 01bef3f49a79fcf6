"""What a step of training minimises. An objective is the only thing that differs between kinds of training.

An objective takes the model and a batch and returns a loss summed over the counted tokens; the loop divides
by their number over the whole global batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from outrider.model.likelihood import IGNORED, summed_loss

#: (model, inputs [B, T], targets [B, T]) -> summed loss, a scalar in nats.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def next_token(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of each next token."""
    return summed_loss(model, inputs, targets)


def distillation(teacher: nn.Module, share: float = 1.0) -> Objective:
    """Return the objective that makes a draft say what its target would say (Hinton et al. 2015).

    `share` of the loss is the cross-entropy against the teacher's law of each next token, the rest the
    ordinary one against the text. A proposal is accepted in proportion to how far the two laws agree,
    so this trains what a draft is for.
    """
    teacher = teacher.eval().requires_grad_(False)

    def objective(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            law = teacher(inputs).float().softmax(-1)
        logits = model(inputs).float()
        width = min(law.shape[-1], logits.shape[-1])  # vocabularies may differ by padding
        counted = (targets != IGNORED).unsqueeze(-1)
        soft = -(law[..., :width] * logits.log_softmax(-1)[..., :width] * counted).sum()
        if share == 1:
            return soft
        hard = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED,
                                           reduction="sum")
        return share * soft + (1 - share) * hard

    return objective
