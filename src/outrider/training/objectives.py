"""What a step of training minimises. An objective is the only thing that differs between kinds of training.

An objective takes the model and a batch and returns the summed loss and the number of tokens it sums over;
the loop divides by the count over the whole global batch.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from outrider.model.likelihood import summed_loss

#: (model, inputs [B, T], targets [B, T]) -> summed loss, a scalar in nats.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def next_token(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of each next token."""
    return summed_loss(model, inputs, targets)
