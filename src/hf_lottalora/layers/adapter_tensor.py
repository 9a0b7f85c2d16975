"""Tensors of an adapter besides A and B, under names by which Trainer sees whether they are decayed."""

from __future__ import annotations

import torch
from torch import nn

# Trainer decides by names alone (`get_decay_parameter_names`): it decays no bias and no norm. And these are norms: a
# magnitude that of a row or column, beta that of the scaffold, in units of the drawn one.
UNDECAYED, DECAYED = "norm", "weight"


class AdapterTensor(nn.Module):
    """Beta, a magnitude, or weight or bias of a LayerNorm: a tensor of one adapter, as a module like A and B are.

    Tools find an adapter's parameters by its name between dots, and Trainer what to decay by the last name: it has no
    other hook. In artifacts the last name does not occur.
    """

    def __init__(self, value: torch.Tensor, decayed: bool) -> None:
        super().__init__()
        self.name = DECAYED if decayed else UNDECAYED
        self.register_parameter(self.name, nn.Parameter(value))

    @property
    def value(self) -> nn.Parameter:
        """The parameter."""
        parameter: nn.Parameter = getattr(self, self.name)
        return parameter
