"""Where the A and B of an adapter come from: LoRA trains them, RandLoRA and NOLA make them of random bases."""

from __future__ import annotations

import math
from typing import Protocol

import torch

from ..config import LottaLoraConfig
from ..scaffold.tensor import ScaffoldTensor
from .coefficients import Coefficients
from .nola import Factors, Member, Nola, bases_of
from .randlora import RandLora


class Source(Protocol):
    """What makes A and B of one layer; A and B here are what the layer holds in their places."""

    def start(self, A: Coefficients, B: Coefficients) -> None:
        """Give them the values to start with."""

    def pair(self, A: Coefficients, B: Coefficients) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, with gradients."""

    def linear(
        self,
        A: Coefficients,
        B: Coefficients,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        beta: torch.Tensor,
        scaling: float,
        weight_is_IO: bool,
    ) -> torch.Tensor:
        """The output of a linear layer, see `ScaledLinear`."""


def start_of_A(path: str, shape: tuple[int, ...], seed: int) -> ScaffoldTensor:
    """What A starts as in a layer that multiplies: Kaiming uniform, a = sqrt(5): U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    scale = 1 / math.sqrt(3 * math.prod(shape[1:]))
    return ScaffoldTensor(f"{path}.lora_A.weight", shape, seed, "uniform", scale)


class Sources:
    """The sources of one adapter, layer by layer."""

    def __init__(self, config: LottaLoraConfig) -> None:
        self.config, self.seed, self.family = config, config.effective_adapter_seed, config.basis_family or ""
        self.factors: dict[str, Factors] = {}

    def of(
        self,
        path: str,
        r: int,
        shapes: tuple[tuple[int, ...], tuple[int, ...]],
        held: tuple[Coefficients, Coefficients],
    ) -> Source:
        """That of the layer with this canonical path, where LoRA's A and B would have these shapes."""
        if self.config.adapter == "randlora":
            return RandLora(self.seed, self.family, r, math.prod(shapes[0][1:]), shapes[1][0])
        places = []
        for factor, shape, coefficients in zip("AB", shapes, held, strict=True):
            shared = None if self.config.bases_shared == "shape" else path
            bases = bases_of(factor, shared, math.prod(shape), self.seed, self.family, self.config.bases or 0)
            factors = self.factors.setdefault(bases.spec.name, Factors(bases))
            start = start_of_A(path, shape, self.seed) if factor == "A" else None
            places.append((factors, factors.add(Member(coefficients, start, shape))))
        (A, at_A), (B, at_B) = places
        return Nola(A, at_A, B, at_B)
