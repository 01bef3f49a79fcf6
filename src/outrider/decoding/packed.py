"""Linear layers whose weights are laid out for the CPU's matrix units.

oneDNN keeps a weight in blocks of its own choosing. With them a pass over several tokens costs little more
than over one, which is what verifying a proposal needs (measured in docs/experiments.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from outrider.devices import physical_memory

#: Up to this many rows PyTorch's own float32 product (a matrix-vector kernel) is the faster one.
_PLAIN_ROWS = 3
#: Below this many elements a call costs more than the layout saves.
_LEAST_ELEMENTS = {torch.float32: 1 << 20, torch.bfloat16: 1 << 18}
#: Float32 keeps both layouts, so it is done only where they take at most this share of the memory.
_MEMORY_SHARE = 0.25


class PackedLinear(nn.Module):
    """A bias-free linear layer [.., in] -> [.., out] on oneDNN's blocked weights."""

    def __init__(self, weight: Tensor, *, keep_plain: bool) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
        self.plain = weight if keep_plain else None

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T."""
        if self.plain is not None and x.numel() // x.shape[-1] <= _PLAIN_ROWS:
            return F.linear(x, self.plain)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def pack_linears(model: nn.Module) -> bool:
    """Replace the large linear layers of a CPU model by packed ones, in place.

    Returns:
        False, with the model as it was, where there are none, or this build of PyTorch or this machine's
        memory rules it out.
    """
    linears = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
               if isinstance(child, nn.Linear) and _pays(child.weight)]
    if not linears or not torch.backends.mkldnn.is_available():
        return False
    weights = [child.weight for _, _, child in linears]
    dtype = weights[0].dtype
    keep_plain = dtype == torch.float32
    memory = physical_memory()
    if keep_plain and memory is not None and sum(w.nbytes for w in weights) > _MEMORY_SHARE * memory:
        return False
    for parent, name, child in linears:
        setattr(parent, name, PackedLinear(child.weight.detach(), keep_plain=keep_plain))
    return True


def _pays(weight: Tensor) -> bool:
    least = _LEAST_ELEMENTS.get(weight.dtype)
    return weight.device.type == "cpu" and least is not None and weight.numel() >= least
