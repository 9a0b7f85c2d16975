"""Weights of at most three values -a, 0 and a as codes of torch's int4 matrix kernel: the same values, read fast.

Four bits a weight. A code c stands for (c - 8) * a, which is exact in every dtype: -a is 7, 0 is 8, a is 9.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from ..scaffold.families import get_family
from ..scaffold.tensor import ScaffoldTensor

# Rows up to which reading the weights dominates, as in decoding; products of more are faster with the values made once.
MOST_ROWS = 16
INT4_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_ternary(family: str) -> bool:
    """Whether a family's values are -a, 0 and a at most."""
    return len(np.unique(np.abs(get_family(family).table[get_family(family).table != 0]))) <= 1


def fits_kernel(scaffold: ScaffoldTensor) -> bool:
    """Whether the kernel takes a weight of this shape: `(outputs, inputs)`, multiples of 16 and 32."""
    return len(scaffold.shape) == 2 and scaffold.shape[0] % 16 == 0 and scaffold.shape[1] % 32 == 0


def int4_codes(scaffold: ScaffoldTensor) -> torch.Tensor:
    """The kernel's own layout of a weight's codes, uint8 of shape `(outputs, inputs / 2)`."""
    codes = scaffold.draw(torch.float32).sign_().add_(8).to(torch.int32)
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


def int4_product(x: torch.Tensor, codes: torch.Tensor, size: float) -> torch.Tensor:
    """`x W^T` for x `(N, inputs)` and the codes of W; `size` is a, as rounded to the dtype of x."""
    outputs, inputs = codes.shape[0], x.shape[1]
    group = next(width for width in (256, 128, 64, 32) if inputs % width == 0)
    scales = _scales(size, inputs // group, outputs, x.dtype)
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), codes, group, scales)
    return product


@lru_cache(maxsize=32)
def _scales(size: float, groups: int, outputs: int, dtype: torch.dtype) -> torch.Tensor:
    """Scale and zero point of each group of inputs."""
    return torch.tensor([size, 0.0], dtype=dtype).repeat(groups, outputs, 1)
