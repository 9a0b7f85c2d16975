"""What is trained in place of A and B: names and shapes, by the kind of the adapter (arXiv 2502.00987, 2310.02556)."""

from __future__ import annotations

import torch
from torch import nn

from ..options import AdapterSource


class Coefficients(nn.Module):
    """Stands where LoRA has a layer for A or B, and holds one tensor, and B's bias if there is one."""

    def __init__(self, name: str, shape: tuple[int, ...], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.register_parameter("bias", bias)

    @property
    def value(self) -> nn.Parameter:
        """The tensor that is trained."""
        parameter: nn.Parameter = getattr(self, self.name)
        return parameter


def coefficient_shapes(
    source: AdapterSource, r: int, inputs: int, outputs: int, bases: int
) -> tuple[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...]]]:
    """Name and shape of what is trained in place of A, and of B.

    Args:
        source: "randlora" or "nola".
        r: rank, of RandLoRA that of each basis.
        inputs: of the layer; of a convolution all that makes one output.
        outputs: of the layer.
        bases: how many NOLA combines.
    """
    if source == "nola":
        return ("coefficients", (bases,)), ("coefficients", (bases,))
    d = min(inputs, outputs)
    n = -(-d // r)
    return ("gamma", (n, d)), ("lambda", (n, r))
